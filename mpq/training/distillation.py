"""The losses of a distillation: distances from the trained model, and the loss on transcripts if there are some.

The teacher's output distributions are what the quantized model is to give (knowledge distillation, Hinton et al. 2015),
those of all of its heads. A head that needs tokens, such as an attention decoder, is given the transcript, or without
one the tokens that the teacher recognises by greedy search. So untranscribed audio is enough.

The divergence of one row saturates, KL / (1 + KL / bound): a mean of plain KL divergences is decided by the few frames
in which the spike of a token has moved by one, and training on it made the typical frame worse (docs/finetune.md).

The outputs alone say too little where there is little audio, as most frames are blank. So the hidden states after each
segment of the encoder are to be those of the teacher too (hints, Romero et al. 2015): their squared error, relative to
the variance of the teacher's states in the utterance.

Legend: N utterances, T feature frames, F features, T' encoder frames, D width, C classes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpq.models.base import AsrModel
from mpq.models.heads import HeadContext, Targets


class DistillationLosses(NamedTuple):
    """Sums over the rows of each utterance, (N,) each, nats.

    Attributes:
        kl: {head: saturating divergences from the teacher}.
        rows: {head: numbers of rows that these are sums over}.
        hidden: Relative squared errors of the encoder's hidden states, means over the segments, times the frames; 0
            where they are not wanted.
        frames: The numbers of encoder frames.
        transcripts: {head: losses of the transcripts}; empty where they are not wanted.
    """

    kl: dict[str, Tensor]
    rows: dict[str, Tensor]
    hidden: Tensor
    frames: Tensor
    transcripts: dict[str, Tensor]

    def each(self) -> Tensor:
        """Returns the (N,) sums of all losses of each utterance."""
        return torch.stack([*self.kl.values(), self.hidden, *self.transcripts.values()]).sum(dim=0)


class Distillation(nn.Module):
    """A student, with quantized weights or without, and its losses, as one module for DistributedDataParallel to wrap.

    Args:
        student: The model; where there are `weights`, its quantizable weights are taken from them.
        weights: Gives {weight name: quantized weight} for the number of an allocation (`QuantizedWeights`); it is
            trained besides the student's other parameters. None: those are all.
        teacher: The model as trained; in eval mode.
        bound: Nats at which the divergence of a row saturates; 0: it does not.
        label_smoothing: The label smoothing of the transcripts' attention loss.
        has_hidden: Whether the errors of the hidden states are wanted.
        has_transcripts: Whether the losses of the transcripts are wanted.
    """

    def __init__(
        self,
        student: AsrModel,
        weights: nn.Module | None,
        teacher: AsrModel,
        bound: float,
        label_smoothing: float,
        has_hidden: bool,
        has_transcripts: bool,
    ) -> None:
        super().__init__()
        self.outputs, self.weights = _Outputs(student), weights
        self._teacher = (_Outputs(teacher),)  # in a tuple, so that it is no part of what is trained
        self.bound, self.label_smoothing = bound, label_smoothing
        self.has_hidden, self.has_transcripts = has_hidden, has_transcripts

    def forward(
        self,
        features: Tensor,
        teacher_features: Tensor,
        frames: Tensor,
        targets: Targets,
        is_transcribed: Tensor,
        allocation: int = 0,
    ) -> DistillationLosses:
        """Returns the losses of a batch.

        Args:
            features, teacher_features: (N, T, F): what the student and the teacher hear.
            frames: (N,) valid frames.
            targets: The transcripts; empty for utterances without one.
            is_transcribed: (N,) bool.
            allocation: The number of the allocation whose widths the weights get.
        """
        (teacher,) = self._teacher
        heads = teacher.model.output_heads
        with torch.no_grad():
            wanted_states = teacher.states(teacher_features, frames)
            lengths = teacher.model.encoded_lengths(frames)
            told = targets
            if any(head.needs_tokens for head in heads):
                found = teacher.model.greedy(wanted_states[-1], lengths)
                told = _filled(targets, is_transcribed, found).to(frames.device)
            contexts = {head.name: head.context(lengths, wanted_states[-1].shape[1], told) for head in heads}
            wanted = teacher.log_probs(wanted_states[-1], contexts)
        quantized = {} if self.weights is None else self.weights(allocation)
        weights = {f"model.{name}": weight for name, weight in quantized.items()}
        states, given = torch.func.functional_call(self.outputs, weights, (features, frames, contexts))
        kl, rows, transcripts = {}, {}, {}
        for head in heads:
            name, context = head.name, contexts[head.name]
            kl[name] = (self._divergence(wanted[name], given[name]) * context.rows).flatten(1).sum(dim=1)
            rows[name] = context.counts().to(kl[name])
            if self.has_transcripts:
                loss = head.loss(given[name], lengths, told, self.label_smoothing)
                transcripts[name] = torch.where(is_transcribed, loss, 0.0)
        hidden = states[-1].new_zeros(len(frames), dtype=torch.float32)
        if self.has_hidden:
            valid = torch.arange(states[-1].shape[1], device=frames.device) < lengths[:, None]  # (N, T')
            errors = [_relative_error(*pair, valid) for pair in zip(states, wanted_states, strict=True)]
            hidden = torch.stack(errors).mean(dim=0) * lengths
        return DistillationLosses(kl, rows, hidden, lengths.float(), transcripts)

    def _divergence(self, wanted: Tensor, given: Tensor) -> Tensor:
        """Returns the saturating KL divergence of (..., C) log-probabilities from those of the teacher."""
        kl = (wanted.exp() * (wanted - given)).sum(dim=-1).clamp(min=0)  # rounding may make it less
        return kl / (1 + kl / self.bound) if self.bound else kl


def _relative_error(given: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Returns the (N,) squared errors of (N, T', D) states in units of the variance of the wanted states."""
    given, wanted, mask = given.float(), wanted.float(), valid[..., None]
    counts = valid.sum(dim=1) * wanted.shape[2]
    mean = (wanted * mask).sum(dim=(1, 2)) / counts
    variance = ((wanted - mean[:, None, None]).square() * mask).sum(dim=(1, 2))
    tiny = torch.finfo(torch.float32).tiny
    return ((given - wanted).square() * mask).sum(dim=(1, 2)) / variance.clamp(min=tiny)


def _filled(targets: Targets, is_transcribed: Tensor, found: list[list[int]]) -> Targets:
    """Returns the transcripts; for utterances without one (where the (N,) bool is false), the recognised tokens."""
    pairs = zip(targets.tokens.tolist(), targets.lengths.tolist(), strict=True)
    rows = [row[:count] for row, count in pairs]
    return Targets.of(
        [row if known else guess for row, known, guess in zip(rows, is_transcribed.tolist(), found, strict=True)]
    )


class _Outputs(nn.Module):
    """A model's hidden states and output distributions as one forward pass."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, features: Tensor, frames: Tensor, contexts: Mapping[str, HeadContext]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Returns the hidden states and the log-probabilities of all heads."""
        states = self.states(features, frames)
        return states, self.log_probs(states[-1], contexts)

    def states(self, features: Tensor, frames: Tensor) -> list[Tensor]:
        """Returns the (N, T', D) states after each segment of the encoder."""
        context, states = self.model.context(frames, features.shape[1]), [features]
        for segment in self.model.segments:
            states.append(segment.run(states[-1], context))
        return states[1:]

    def log_probs(self, encoded: Tensor, contexts: Mapping[str, HeadContext]) -> dict[str, Tensor]:
        """Returns {head: (N, ..., C) log-probabilities} of the encoder output and each head's context."""
        return {
            head.name: head.log_probs(head.logits(encoded, contexts[head.name].inputs).float())
            for head in self.model.output_heads
        }
