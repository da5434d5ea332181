"""Heads: from the encoder output to distributions of tokens, losses and transcripts.

A model is an encoder and its heads. A head knows the chain of segments from the encoder output to its logits, which
rows of the logits count, its loss for transcripts, and its searches; every other package asks the model's heads and
knows none of them by name. `CtcHead` gives each encoder frame a distribution of the tokens and a blank (Graves et al.
2006); `AttentionHead` gives one of the next token after each token of a transcript (Watanabe et al. 2017).

To add a head, write a class here or beside this module, and return it from the `output_heads` of a model.

Legend: N utterances, T' encoder frames, D encoder width, U tokens, V classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.models.attention_decoder import TransformerDecoder, decoder_context
from mpq.models.segment import Segment
from mpq.speech.ctc_search import ctc_greedy, ctc_prefix_beam
from mpq.speech.decoding import GREEDY, DecodeOptions, Hypothesis
from mpq.speech.joint_search import joint_beam

_IGNORED = -100
"""The target of `F.cross_entropy` that counts nothing."""


@dataclass(frozen=True)
class Targets:
    """The transcripts of a batch.

    Attributes:
        tokens: (N, U) padded with 0.
        lengths: (N,) tokens.
        path: Bool, in the shape of the logits without their last axis: the distributions that a greedy search passed,
            where these form a lattice (of frames and tokens, as a transducer has). None for all other tokens.
    """

    tokens: Tensor
    lengths: Tensor
    path: Tensor | None = None

    @classmethod
    def of(cls, tokens: list[list[int]], least: int = 1) -> "Targets":
        """Returns the targets of N transcripts; U is `least` or more (torch's CTC loss asks for 1)."""
        lengths = torch.tensor([len(one) for one in tokens])
        padded = torch.zeros(len(tokens), max(least, int(lengths.max())), dtype=torch.long)
        for row, one in zip(padded, tokens, strict=True):
            row[: len(one)] = torch.tensor(one, dtype=torch.long)
        return cls(padded, lengths)

    def to(self, device: torch.device) -> "Targets":
        path = None if self.path is None else self.path.to(device)
        return Targets(self.tokens.to(device), self.lengths.to(device), path)


@dataclass(frozen=True)
class HeadContext:
    """The inputs of a head besides the encoder output, and the rows that count; nothing that is trained changes them.

    Attributes:
        rows: Bool, in the shape of the logits without their last axis: the distributions that count.
        inputs: The input of the head's segments besides the hidden state.
    """

    rows: Tensor
    inputs: Any

    def counts(self) -> Tensor:
        """Returns the (N,) rows of each utterance that count."""
        return self.rows.flatten(1).sum(dim=1)


class Head(ABC):
    """A head of a model."""

    name: str
    """The name in `AsrModel.heads`: "ctc", "attention", ..."""
    output: str
    """The name of its output in JSON files and options: "ctc", "decoder", ..."""
    needs_tokens: bool
    """Whether the distributions depend on the tokens of a transcript."""
    searches: tuple[str, ...]
    """The methods of `DecodeOptions` that it has; "greedy" is one of them."""

    @property
    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """The chain from the (N, T', D) encoder output to the logits."""

    @abstractmethod
    def context(self, encoded_lengths: Tensor, frames: int, targets: Targets) -> HeadContext:
        """Returns the inputs of the head besides the encoder output, and the rows that count.

        Args:
            encoded_lengths: (N,) valid encoder frames.
            frames: T' of the padded encoder output.
            targets: The tokens that the distributions depend on; a head without `needs_tokens` ignores them. The rows
                of a lattice are those of the path where `targets` has one, else all valid ones.
        """

    @abstractmethod
    def log_probs(self, logits: Tensor) -> Tensor:
        """Returns the natural-log probabilities of the distributions, in the shape of the logits."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Returns the input of `loss`, float32: log-probabilities, or the logits where the loss itself normalises."""

    @abstractmethod
    def loss(self, scores: Tensor, encoded_lengths: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
        """Returns the (N,) losses of transcripts, nats summed over the tokens of each utterance.

        Args:
            scores: The result of `scores`, or log-probabilities.
            encoded_lengths: (N,) valid encoder frames.
            targets: The transcripts.
            label_smoothing: Share of the target that is spread over all classes, where the loss has such a target.
        """

    @abstractmethod
    def loss_tokens(self, tokens: int, utterances: int) -> int:
        """Returns by how many tokens the summed loss of a batch is divided to give a mean, 1 at least."""

    @abstractmethod
    def search(self, encoded: Tensor, encoded_lengths: Tensor, options: DecodeOptions = GREEDY) -> list[list[int]]:
        """Returns the token ids that a search finds for each utterance.

        Args:
            encoded, encoded_lengths: (N, T', D) and (N,), as `AsrModel.encode` returned them.
            options: The search; its method is one of `searches`.
        """

    @abstractmethod
    def recognised(self, encoded: Tensor, encoded_lengths: Tensor) -> Targets:
        """Returns the tokens that greedy search finds, with its path if the distributions form a lattice.

        The arguments are those of `search`.
        """

    def logits(self, encoded: Tensor, inputs: Any) -> Tensor:
        """Returns the logits of the (N, T', D) encoder output.

        Args:
            encoded: The encoder output.
            inputs: The `inputs` of the head's `HeadContext`.
        """
        hidden: Any = encoded
        for segment in self.segments:
            hidden = segment.run(hidden, inputs)
        return cast(Tensor, hidden)


@final
class CtcHead(Head):
    """(N, T', V) logits: for each encoder frame one of the tokens or the blank.

    Args:
        prefix: The names of its weights start with this.
        project: (N, T', D) -> (N, T', V).
        blank_id: The class of the blank.
    """

    name, output, needs_tokens, searches = "ctc", "ctc", False, ("greedy", "prefix")

    def __init__(self, prefix: str, project: Callable[[Tensor], Tensor], blank_id: int) -> None:
        self.prefix, self.project, self.blank_id = prefix, project, blank_id

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (Segment((self.prefix,), lambda encoded, _: self.project(encoded)),)

    def context(self, encoded_lengths: Tensor, frames: int, targets: Targets) -> HeadContext:
        return HeadContext(torch.arange(frames, device=encoded_lengths.device) < encoded_lengths[:, None], None)

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(dim=-1)

    def loss(self, scores: Tensor, encoded_lengths: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
        return ctc_loss(scores, encoded_lengths, targets, self.blank_id)

    def loss_tokens(self, tokens: int, utterances: int) -> int:
        return max(1, tokens)

    def search(self, encoded: Tensor, encoded_lengths: Tensor, options: DecodeOptions = GREEDY) -> list[list[int]]:
        log_probs = self.log_probs(self.logits(encoded, None))
        if options.method == "greedy":
            return ctc_greedy(log_probs, encoded_lengths, self.blank_id)
        return _best(ctc_prefix_beam(log_probs, encoded_lengths, self.blank_id, options.beam_size, options.candidates))

    def recognised(self, encoded: Tensor, encoded_lengths: Tensor) -> Targets:
        return Targets.of(self.search(encoded, encoded_lengths), least=0).to(encoded.device)


@final
class AttentionHead(Head):
    """(N, U + 1, V) logits: the next token after <sos> and after each token of a transcript, <eos> after the last.

    Args:
        prefix: The names of its weights start with this.
        decoder: The attention decoder.
        end_id: The class of <sos> and <eos>.
        ctc: The CTC head of the same model, which the joint search weighs its opinion against.
    """

    name, output, needs_tokens, searches = "attention", "decoder", True, ("greedy", "joint")

    def __init__(self, prefix: str, decoder: TransformerDecoder, end_id: int, ctc: CtcHead) -> None:
        self.prefix, self.decoder, self.end_id, self.ctc = prefix, decoder, end_id, ctc

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(
            Segment(tuple(f"{self.prefix}{module}." for module in modules), step)
            for modules, step in self.decoder.steps()
        )

    def context(self, encoded_lengths: Tensor, frames: int, targets: Targets) -> HeadContext:
        prefixes, following = with_ends(targets, self.end_id)
        return HeadContext(following >= 0, decoder_context(prefixes, encoded_lengths, frames))

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float()

    def loss(self, scores: Tensor, encoded_lengths: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
        return attention_loss(scores, with_ends(targets, self.end_id)[1], label_smoothing)

    def loss_tokens(self, tokens: int, utterances: int) -> int:
        return max(1, tokens + utterances)

    def search(self, encoded: Tensor, encoded_lengths: Tensor, options: DecodeOptions = GREEDY) -> list[list[int]]:
        is_greedy = options.method == "greedy"
        return _best(
            joint_beam(
                self.decoder.scorer(encoded, encoded_lengths),
                self.ctc.log_probs(self.ctc.logits(encoded, None)),
                encoded_lengths,
                self.end_id,
                beam_size=1 if is_greedy else options.beam_size,
                ctc_weight=0.0 if is_greedy else options.ctc_weight,
                length_bonus=0.0 if is_greedy else options.length_bonus,
                candidates=options.candidates,
                blank_id=self.ctc.blank_id,
            )
        )

    def recognised(self, encoded: Tensor, encoded_lengths: Tensor) -> Targets:
        return Targets.of(self.search(encoded, encoded_lengths), least=0).to(encoded.device)


def ctc_loss(log_probs: Tensor, encoded_lengths: Tensor, targets: Targets, blank: int) -> Tensor:
    """Returns the (N,) CTC losses, nats, of (N, T', V) log-probabilities with (N,) valid frames."""
    return F.ctc_loss(
        log_probs.transpose(0, 1), targets.tokens, encoded_lengths, targets.lengths, blank=blank, reduction="none"
    )


def attention_loss(logits: Tensor, following: Tensor, label_smoothing: float) -> Tensor:
    """Returns the (N,) losses, nats summed over tokens, of (N, U + 1, V) logits; following as `with_ends` gives it."""
    losses = F.cross_entropy(
        logits.transpose(1, 2),
        following,
        ignore_index=_IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.sum(dim=1)


def with_ends(targets: Targets, end: int) -> tuple[Tensor, Tensor]:
    """Returns (N, U + 1) tokens with <sos> before them, and with <eos> after them (then padding that is ignored)."""
    tokens, lengths = targets.tokens, targets.lengths
    steps = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    prefixes = F.pad(tokens, (1, 0), value=end)
    following = F.pad(tokens, (0, 1), value=_IGNORED)
    following = following.masked_fill(steps == lengths[:, None], end)
    return prefixes, following.masked_fill(steps > lengths[:, None], _IGNORED)


def _best(beams: list[list[Hypothesis]]) -> list[list[int]]:
    return [list(hypotheses[0].tokens) for hypotheses in beams]
