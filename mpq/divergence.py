"""How far the output of a changed model is from that of the model as trained: KL divergence per frame, in nats.

The calibration data lie before the model as batches of hidden states that walk through its stages, so that a change in
stage s needs only the stages from s on (`OutputBatch`); `JointDivergence` keeps the states before every stage, and so
measures one change after another of a model with all of its layers quantized.

Two means over frames are used. That of one layer's sensitivity is plain (Li et al. 2023, Eq. 7). That of a whole
model is bounded: no frame counts more than BOUND. A plain mean is decided by the few frames where the spike of a token
has moved by one, which changes no word (docs/rounding.md has how both go with the word errors).

Legend: N utterances, T feature frames, F features, T' encoder frames, M valid encoder frames, V classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel, Stage

OUTPUTS = ("ctc", "encoder")

BOUND = 1.0
"""Nats that one frame counts at most in the divergence of a whole model."""


class OutputBatch:
    """A batch of data on its way through the model.

    Args:
        model: The model whose stages it will go through.
        features, lengths: (N, T, F) and (N,) valid frames.
    """

    def __init__(self, model: AsrModel, features: Tensor, lengths: Tensor) -> None:
        self.hidden = features
        self.context = model.context(lengths, features.shape[1])
        self.lengths = model.encoded_lengths(lengths)  # (N,)

    def advance(self, stage: Stage) -> None:
        """Takes the hidden state through a stage."""
        self.hidden = stage.run(self.hidden, self.context)

    def log_distribution(self, stages: Sequence[Stage]) -> Tensor:
        """Returns what these stages make of the hidden state: (M, V) float64 log-softmax of the valid frames."""
        x = self.hidden
        for stage in stages:
            x = stage.run(x, self.context)
        return self.log_softmax(x)

    def log_softmax(self, x: Tensor) -> Tensor:
        """Returns (M, V) float64 log-probabilities of the valid frames of logits (N, T', V)."""
        valid = torch.arange(x.shape[1], device=x.device) < self.lengths[:, None]  # (N, T')
        return x[valid].double().log_softmax(dim=-1)


def mean_kl(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Returns the mean over all rows of all pairs of KL(first || second), nats (Li et al. 2023, Eq. 7).

    Args:
        pairs: Of (M, V) float64 log-probabilities.
    """
    total, frames = 0.0, 0
    for reference, changed in pairs:
        total += float((reference.exp() * (reference - changed)).sum())
        frames += len(reference)
    return total / frames


def output_divergence(
    model: AsrModel, changed: AsrModel, data: Sequence[tuple[Tensor, Tensor]], output: str = "ctc"
) -> float:
    """Returns the bounded mean KL divergence per frame of a changed model's output from the model's, nats.

    Args:
        model: As trained.
        changed: A model of the same shape.
        data: Batches of ((N, T, F) features, (N,) valid frames).
        output: "ctc" or "encoder": whose softmax.
    """
    chains = [_chain(one, output) for one in (model, changed)]
    with torch.inference_mode():
        batches = [OutputBatch(model, *batch) for batch in data]
        sums = [float(_bounded(*map(batch.log_distribution, chains)).sum()) for batch in batches]
    kl = sum(sums) / sum(int(batch.lengths.sum()) for batch in batches)
    if not math.isfinite(kl):
        raise MpqError(f"expected a finite divergence of the changed model, got {kl}; its activations overflow")
    return kl


def _chain(model: AsrModel, output: str) -> tuple[Stage, ...]:
    """Returns the stages from the features to the logits whose softmax is compared."""
    if output not in OUTPUTS:
        raise MpqError(f"output: expected {' or '.join(OUTPUTS)}, got {output!r}")
    return (*model.stages, model.head) if output == "ctc" else tuple(model.stages)


def owner(name: str, stages: Sequence[Stage]) -> int:
    """Returns the index of the stage that uses a weight."""
    found = [index for index, stage in enumerate(stages) if name.startswith(stage.prefixes)]
    assert len(found) == 1, f"{name}: the model's stages do not own each weight once"
    return found[0]


class JointDivergence:
    """The bounded divergence of a model with many changed weights from the same model as it was, on fixed data.

    The hidden states before every stage are kept, of the model as it is now, and the reference distributions: together
    1.8 MB for each second of audio with NVIDIA's 13 M Conformer. `change` needs as much again for the new states.

    Args:
        model: As trained. Its weights are changed in place; `restore` brings them back.
        data: Batches of ((N, T, F) features, (N,) valid frames).
        output: "ctc" or "encoder": whose softmax.

    Raises:
        MpqError: An unknown output.
    """

    def __init__(self, model: AsrModel, data: Sequence[tuple[Tensor, Tensor]], output: str = "ctc") -> None:
        self._stages = _chain(model, output)
        self._all_stages = (*model.stages, model.head)
        self._parameters = dict(model.named_parameters())
        self._originals: dict[str, Tensor] = {}
        with torch.inference_mode():
            self._batches = [OutputBatch(model, *batch) for batch in data]
            self._states = self._walk(0, keep=True)
            self._references = [
                batch.log_softmax(states[-1]) for batch, states in zip(self._batches, self._states, strict=True)
            ]
        self.frames = sum(len(reference) for reference in self._references)
        """Valid encoder frames of the data."""
        self.kl: Tensor = torch.zeros(self._utterances, dtype=torch.float64)
        """(utterances,) sums over the frames of each, of the model as it is now."""

    @property
    def mean(self) -> float:
        """The divergence of the model as it is now, nats per frame."""
        return float(self.kl.sum()) / self.frames

    def measure(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns what `kl` would be with these weights, (utterances,) nats; the model stays as it is."""
        before = {name: self._parameters[name].data for name in weights}
        try:
            return self._measured(weights, keep=False)[0]
        finally:
            for name, tensor in before.items():
                self._parameters[name].data = tensor

    def change(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the model these weights."""
        for name in weights:
            self._originals.setdefault(name, self._parameters[name].data)
        self.kl, first, states = self._measured(weights, keep=True)
        for own, new in zip(self._states, states, strict=True):
            own[first:] = new

    def restore(self) -> None:
        """Gives the model its own weights back; nothing can be measured after that."""
        for name, tensor in self._originals.items():
            self._parameters[name].data = tensor

    @property
    def _utterances(self) -> int:
        return sum(len(batch.lengths) for batch in self._batches)

    def _measured(self, weights: Mapping[str, Tensor], keep: bool) -> tuple[Tensor, int, list[list[Tensor]]]:
        """Returns each utterance's sum, the first stage that changed, and the states from there on (or the last)."""
        for name, tensor in weights.items():
            self._parameters[name].data = tensor
        owners = [owner(name, self._all_stages) for name in weights]
        first = min([*owners, len(self._stages)])
        with torch.inference_mode():
            states = self._walk(first, keep)
            kl = [
                _sums(reference, batch.log_softmax(new[-1]), batch.lengths)
                for reference, batch, new in zip(self._references, self._batches, states, strict=True)
            ]
        sums = torch.cat(kl)
        if not bool(sums.isfinite().all()):
            raise MpqError("expected a finite divergence of the quantized model, got NaN or infinity")
        return sums, first, states

    def _walk(self, first: int, keep: bool) -> list[list[Tensor]]:
        """Returns for each batch the states before stage `first` and after each stage from there on, or the last."""
        found = []
        for index, batch in enumerate(self._batches):
            states = [self._states[index][first] if first else batch.hidden]
            for stage in self._stages[first:]:
                states.append(stage.run(states[-1], batch.context))
                if not keep:
                    del states[0]
            found.append(states)
        return found


def _bounded(reference: Tensor, changed: Tensor) -> Tensor:
    """Returns the (M,) bounded KL(reference || changed) of each frame."""
    return (reference.exp() * (reference - changed)).sum(dim=-1).clamp(max=BOUND)


def _sums(reference: Tensor, changed: Tensor, lengths: Tensor) -> Tensor:
    """Returns the (N,) sums of the bounded divergence over the frames of each utterance."""
    return torch.stack([part.sum() for part in _bounded(reference, changed).split(lengths.tolist())]).cpu()
