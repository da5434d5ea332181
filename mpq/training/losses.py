"""The joint CTC/attention loss (Watanabe et al. 2017; Li et al. 2023, Eq. 1).

Legend: N utterances, T feature frames, F features, T' encoder frames, U tokens, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.models.base import AsrModel

_IGNORED = -100


@dataclass(frozen=True)
class Targets:
    """The transcripts of a batch.

    Attributes:
        tokens: (N, U) padded with 0.
        lengths: (N,) tokens.
    """

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, tokens: list[list[int]]) -> "Targets":
        """Returns the targets of N transcripts."""
        lengths = torch.tensor([len(one) for one in tokens])
        padded = torch.zeros(len(tokens), max(1, int(lengths.max())), dtype=torch.long)
        for row, one in zip(padded, tokens, strict=True):
            row[: len(one)] = torch.tensor(one, dtype=torch.long)
        return cls(padded, lengths)

    def to(self, device: torch.device) -> "Targets":
        return Targets(self.tokens.to(device), self.lengths.to(device))


class JointLoss(nn.Module):
    """A model and the two losses of a batch; what DistributedDataParallel wraps.

    Args:
        model: The model.
        label_smoothing: Of the attention loss.
    """

    def __init__(self, model: AsrModel, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, features: Tensor, lengths: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Returns the (N,) CTC losses and attention losses, nats summed over the tokens of each utterance.

        Args:
            features: (N, T, F).
            lengths: (N,) valid frames.
            targets: Of the batch.
        """
        return self.of_encoded(*self.model.encode(features, lengths), targets)

    def of_encoded(self, encoded: Tensor, encoded_lengths: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Returns what `forward` does, from the (N, T', D) encoder output and its (N,) valid frames."""
        log_probs = self.model.head.run(encoded, None).float().log_softmax(dim=-1)  # (N, T', C)
        ctc = ctc_loss(log_probs, encoded_lengths, targets, self.model.blank_id)
        if not self.model.decoder_segments:
            return ctc, torch.zeros_like(ctc)
        prefixes, following = with_ends(targets, self.model.blank_id)
        logits = self.model.attention_logits(prefixes, encoded, encoded_lengths).float()  # (N, U + 1, C)
        return ctc, attention_loss(logits, following, self.label_smoothing)


def ctc_loss(log_probs: Tensor, encoded_lengths: Tensor, targets: Targets, blank: int) -> Tensor:
    """Returns the (N,) CTC losses, nats, of (N, T', C) log-probabilities with (N,) valid frames."""
    return F.ctc_loss(
        log_probs.transpose(0, 1), targets.tokens, encoded_lengths, targets.lengths, blank=blank, reduction="none"
    )


def attention_loss(logits: Tensor, following: Tensor, label_smoothing: float) -> Tensor:
    """Returns the (N,) losses, nats summed over tokens, of (N, U + 1, C) logits; following as `with_ends` gives it."""
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
