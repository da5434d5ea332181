"""What a fine-tuning goes by: the trained model as teacher, and the transcripts where there are some.

The teacher's output distributions are what the quantized model is to give (knowledge distillation, Hinton et al. 2015):
of the CTC head for each frame, and of the attention decoder, where there is one, for each token and <eos>. The decoder
is given the transcript, or without one the tokens that the teacher recognises by greedy CTC. So untranscribed audio
is enough.

The divergence of one row saturates, KL / (1 + KL / bound): a mean of plain KL divergences is decided by the few frames
in which the spike of a token has moved by one, and training on it made the typical frame worse (docs/finetune.md).

Where audio is little, the outputs say too little: most frames are blank. So the hidden states after each segment of the
encoder are to be those of the teacher too (hints, Romero et al. 2015): their squared error, relative to the variance of
the teacher's states in the utterance.

Legend: N utterances, T feature frames, F features, T' encoder frames, U tokens, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpq.models.base import AsrModel
from mpq.speech.decoding import ctc_greedy
from mpq.training.losses import Targets, attention_loss, ctc_loss, with_ends


class DistillationLosses(NamedTuple):
    """Sums over the rows of each utterance, (N,) each, nats; 0 for what there is not.

    Attributes:
        ctc_kl, attention_kl: Saturating divergences from the teacher.
        hidden: Relative squared errors of the encoder's hidden states, means over the segments.
        frames, tokens: How many rows these are sums over.
        ctc, attention: Losses of the transcripts.
    """

    ctc_kl: Tensor
    attention_kl: Tensor
    hidden: Tensor
    frames: Tensor
    tokens: Tensor
    ctc: Tensor
    attention: Tensor


class Distillation(nn.Module):
    """A student, with quantized weights or without, and its losses; what DistributedDataParallel wraps.

    Args:
        student: The model; where there are `weights`, its quantizable weights are taken from them.
        weights: Gives {weight name: quantized weight} for the number of an allocation (`QuantizedWeights`); it is
            trained besides the student's other parameters. None: those are all.
        teacher: The model as trained; in eval mode.
        bound: Nats at which the divergence of a row saturates; 0: it does not.
        label_smoothing: Of the transcripts' attention loss.
        has_hidden: Whether the errors of the hidden states are wanted.
        has_transcripts: Whether the losses of the transcripts are.
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
            allocation: Whose widths.
        """
        (teacher,) = self._teacher
        blank = teacher.model.blank_id
        with torch.no_grad():
            wanted_states, wanted = teacher.ctc(teacher_features, frames)
            encoded, lengths = wanted_states[-1], teacher.model.encoded_lengths(frames)
            prefixes = following = None
            if teacher.model.decoder_segments:
                found = ctc_greedy(wanted, lengths, blank)
                pairs = zip(targets.tokens.tolist(), targets.lengths.tolist(), strict=True)
                rows = [row[:count] for row, count in pairs]
                told = [
                    row if known else guess
                    for row, known, guess in zip(rows, is_transcribed.tolist(), found, strict=True)
                ]
                prefixes, following = with_ends(Targets.of(told).to(frames.device), blank)
            wanted_attention = teacher.attention(prefixes, encoded, lengths)
        quantized = {} if self.weights is None else self.weights(allocation)
        weights = {f"model.{name}": weight for name, weight in quantized.items()}
        states, given, given_attention = torch.func.functional_call(self.outputs, weights, (features, frames, prefixes))
        none = given.new_zeros(len(frames))
        valid = torch.arange(given.shape[1], device=frames.device) < lengths[:, None]  # (N, T')
        ctc_kl = (self._divergence(wanted, given) * valid).sum(dim=1)
        hidden = none
        if self.has_hidden:
            errors = [_relative_error(*pair, valid) for pair in zip(states, wanted_states, strict=True)]
            hidden = torch.stack(errors).mean(dim=0) * lengths
        attention_kl = tokens = none
        if given_attention is not None:
            spoken = following >= 0  # (N, U + 1)
            attention_kl = (self._divergence(wanted_attention, given_attention) * spoken).sum(dim=1)
            tokens = spoken.sum(dim=1).to(given)
        ctc = attention = none
        if self.has_transcripts:
            ctc = torch.where(is_transcribed, ctc_loss(given, lengths, targets, blank), 0.0)
            if given_attention is not None:
                smoothed = attention_loss(given_attention, following, self.label_smoothing)
                attention = torch.where(is_transcribed, smoothed, 0.0)
        return DistillationLosses(ctc_kl, attention_kl, hidden, lengths.to(given), tokens, ctc, attention)

    def _divergence(self, wanted: Tensor, given: Tensor) -> Tensor:
        """Returns the saturating KL divergence of (..., C) log-probabilities from those of the teacher."""
        kl = (wanted.exp() * (wanted - given)).sum(dim=-1).clamp(min=0)  # rounding may make it less
        return kl / (1 + kl / self.bound) if self.bound else kl


def _relative_error(given: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Returns the (N,) squared errors of (N, T', D) states in units of the variance of what is wanted."""
    given, wanted, mask = given.float(), wanted.float(), valid[..., None]
    counts = valid.sum(dim=1) * wanted.shape[2]
    mean = (wanted * mask).sum(dim=(1, 2)) / counts
    variance = ((wanted - mean[:, None, None]).square() * mask).sum(dim=(1, 2))
    tiny = torch.finfo(torch.float32).tiny
    return ((given - wanted).square() * mask).sum(dim=(1, 2)) / variance.clamp(min=tiny)


class _Outputs(nn.Module):
    """A model's hidden states and output distributions as one forward pass."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, features: Tensor, frames: Tensor, prefixes: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Returns what `ctc` returns, and `attention` of (N, U + 1) tokens."""
        states, ctc = self.ctc(features, frames)
        return states, ctc, self.attention(prefixes, states[-1], self.model.encoded_lengths(frames))

    def ctc(self, features: Tensor, frames: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns the (N, T', D) states after each segment of the encoder, and (N, T', C) CTC log-probabilities."""
        context, states = self.model.context(frames, features.shape[1]), [features]
        for segment in self.model.segments:
            states.append(segment.run(states[-1], context))
        return states[1:], self.model.head.run(states[-1], None).float().log_softmax(dim=-1)

    def attention(self, prefixes: Tensor | None, encoded: Tensor, lengths: Tensor) -> Tensor | None:
        """Returns the decoder's (N, U + 1, C) log-probabilities; None without prefixes."""
        if prefixes is None:
            return None
        return self.model.attention_logits(prefixes, encoded, lengths).float().log_softmax(dim=-1)
