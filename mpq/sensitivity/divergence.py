"""The divergence of a changed model's output from that of the model as trained: KL per row, in nats.

The calibration data lie before the model as batches of hidden states that walk through its segments (`SegmentTree`), so
that a change in segment s needs only the segments after s (`OutputBatch`); `JointDivergence` keeps the states before
every segment, and so measures one change after another of a model with all of its layers quantized.

An output is a distribution for each *row*. The rows of "encoder", softmax of the encoder's output, are the valid
encoder frames; those of a head's output are given by the head (`mpq.models.heads`): the valid frames for CTC, the
tokens of the transcript and <eos> for an attention decoder. A head that needs tokens is given those that the unchanged
model recognises by greedy search. Recognition uses the outputs of all heads: the divergence of a whole model is the
mean over the rows of all of them.

Two means over rows are used. That of one layer's sensitivity is plain (Li et al. 2023, Eq. 7). That of a whole
model is bounded: no row counts more than BOUND. A plain mean is decided by the few frames where the spike of a token
has moved by one, which changes no word (docs/rounding.md has how both go with the word errors).

Legend: N utterances, T feature frames, F features, M rows of all utterances, V classes.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.segment import Segment

BOUND = 1.0
"""Nats that one row counts at most in the divergence of a whole model."""


class SegmentTree:
    """All segments of a model: features -> encoder output, and encoder output -> logits for each head.

    State 0 is the features, and state i + 1 is the result of segment i.

    Args:
        model: The model whose segments these are.
    """

    def __init__(self, model: AsrModel) -> None:
        encoded = len(model.segments)  # the state
        segments, sources, parts = [*model.segments], [*range(encoded)], ["encoder"] * encoded
        self.ends = {"encoder": encoded}
        """{output: the state whose softmax it is}."""
        for head in model.output_heads:
            chain = head.segments
            sources += [encoded, *range(len(segments) + 1, len(segments) + len(chain))]
            parts += [head.name] * len(chain)
            segments += chain
            self.ends[head.output] = len(segments)
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.sources = tuple(sources)
        """The state that each segment reads."""
        self.parts = tuple(parts)
        """The part of the model that each segment belongs to: "encoder" or the name of a head."""
        self.recognition = tuple(head.output for head in model.output_heads)
        """The outputs that recognition uses; each weight takes part in one of them."""
        self.log_probs = log_probs_of_outputs(model)
        """{output: logits -> natural-log probabilities}."""

    def check(self, output: str) -> None:
        """Raises MpqError unless the model has this output."""
        if output not in self.ends:
            raise MpqError(f"output: expected {' or '.join(self.ends)}, which this model has, got {output!r}")

    def path(self, *outputs: str) -> tuple[int, ...]:
        """Returns the segments between the features and these outputs, in an order in which they can run."""
        found = set()
        for output in outputs:
            state = self.ends[output]
            while state:
                found.add(state - 1)
                state = self.sources[state - 1]
        return tuple(sorted(found))

    def after(self, changed: Set[int], path: Sequence[int]) -> tuple[int, ...]:
        """Returns the segments of a path whose result is another one after a change of the segments `changed`."""
        found: list[int] = []
        for index in path:
            if index in changed or self.sources[index] - 1 in found:
                found.append(index)
        return tuple(found)

    def measured_over(self, index: int, output: str) -> str:
        """Returns `output`, or an output of recognition that depends on segment `index` if that one does not."""
        return next(one for one in (output, *self.recognition) if index in self.path(one))

    def run(
        self,
        states: Mapping[int, Any],
        path: Sequence[int],
        inputs: Mapping[str, Any],
        keep: Container[int] | None = None,
    ) -> dict[int, Any]:
        """Returns the states that the segments of a path make, by their numbers.

        Args:
            states: The states that the path reads but does not make.
            path: Segments, in order.
            inputs: The `inputs` of an `mpq.models.base.OutputContext`.
            keep: The states to return among those that a segment of the path reads; None for all.
        """
        found: dict[int, Any] = {}
        for place, index in enumerate(path):
            source = self.sources[index]
            hidden = found[source] if source in found else states[source]
            found[index + 1] = self.segments[index].run(hidden, inputs[self.parts[index]])
            is_read = any(self.sources[later] == source for later in path[place + 1 :])
            if keep is not None and source not in keep and not is_read:
                found.pop(source, None)
        return found


class OutputBatch:
    """A batch of data on its way through the model.

    Args:
        model: The model whose segments it will go through.
        features, lengths: (N, T, F) and (N,) valid frames.
    """

    def __init__(self, model: AsrModel, features: Tensor, lengths: Tensor) -> None:
        self.states: dict[int, Any] = {0: features}
        """{state of the tree: hidden state}: those that later segments read."""
        self.context = model.output_context(features, lengths)
        self._log_probs = log_probs_of_outputs(model)
        self.counts = {output: rows.flatten(1).sum(dim=1) for output, rows in self.context.rows.items()}
        """{output: (N,) rows of each utterance}."""

    def advance(self, tree: SegmentTree, index: int) -> None:
        """Takes the batch through segment `index` after all before it; keeps the states that later segments read."""
        read = set(tree.sources[index + 1 :])
        if index + 1 in read:
            self.states |= tree.run(self.states, (index,), self.context.inputs)
        self.states = {state: hidden for state, hidden in self.states.items() if state in read}

    def log_distribution(self, tree: SegmentTree, path: Sequence[int], output: str) -> Tensor:
        """Returns (M, V) float64 log-softmax of an output's rows; the path leads from the states to the output."""
        return self.log_distributions(tree, (output,), path)[output]

    def log_distributions(
        self, tree: SegmentTree, outputs: Sequence[str], path: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Returns {output: (M, V) float64 log-softmax of its rows}.

        Args:
            tree: The segments.
            outputs: Some of its outputs.
            path: The segments between the batch's states and these outputs; None: all from the features on.
        """
        logits = self.logits(tree, outputs, path)
        return {output: self.log_softmax(x, output) for output, x in logits.items()}

    def logits(self, tree: SegmentTree, outputs: Sequence[str], path: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Returns {output: its (N, ..., V) logits}, as `log_distributions`; of "encoder" the encoder output."""
        ends = {output: tree.ends[output] for output in outputs}
        path = tree.path(*outputs) if path is None else path
        states = self.states | tree.run(self.states, path, self.context.inputs, keep=ends.values())
        return {output: states[end] for output, end in ends.items()}

    def log_softmax(self, x: Tensor, output: str) -> Tensor:
        """Returns (M, V) float64 log-probabilities of the rows of an output, of its (N, ..., V) logits."""
        return self._log_probs[output](x[self.context.rows[output]].double())


def log_probs_of_outputs(model: AsrModel) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns {output: logits -> natural-log probabilities} of the encoder's output and of the heads."""
    heads = {head.output: head.log_probs for head in model.output_heads}
    return {"encoder": lambda x: x.log_softmax(dim=-1), **heads}


def mean_kl(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Returns the mean over all rows of all pairs of KL(first || second), nats (Li et al. 2023, Eq. 7).

    Args:
        pairs: Pairs of (M, V) float64 log-probabilities.
    """
    total, frames = 0.0, 0
    for reference, changed in pairs:
        total += float((reference.exp() * (reference - changed)).sum())
        frames += len(reference)
    return total / frames


def output_divergence(
    model: AsrModel, changed: AsrModel, data: Sequence[tuple[Tensor, Tensor]], output: str | None = None
) -> float:
    """Returns the bounded mean KL divergence per row of a changed model's output from the model's, nats.

    Args:
        model: The trained model.
        changed: A model of the same shape.
        data: Batches of ((N, T, F) features, (N,) valid frames).
        output: "encoder" or the output of a head; None for all those that recognition uses.

    Raises:
        MpqError: An output that the model does not have, or a divergence that is not finite.
    """
    tree, changed_tree = SegmentTree(model), SegmentTree(changed)
    outputs = _measured_outputs(tree, output)
    total, rows = 0.0, 0
    with torch.inference_mode():
        for features, lengths in data:
            batch = OutputBatch(model, features, lengths)
            references, found = (batch.log_distributions(one, outputs) for one in (tree, changed_tree))
            total += sum(float(bounded_kl(references[one], found[one]).sum()) for one in outputs)
            rows += sum(len(reference) for reference in references.values())
    kl = total / rows
    if not math.isfinite(kl):
        raise MpqError(f"expected a finite divergence of the changed model, got {kl}; its activations overflow")
    return kl


def _measured_outputs(tree: SegmentTree, output: str | None) -> tuple[str, ...]:
    """Returns the outputs over which the divergence of a whole model is taken."""
    if output is None:
        return tree.recognition
    tree.check(output)
    return (output,)


def owner(name: str, segments: Sequence[Segment]) -> int:
    """Returns the index of the segment that uses a weight."""
    found = [index for index, segment in enumerate(segments) if name.startswith(segment.prefixes)]
    assert len(found) == 1, f"{name}: the model's segments do not own each weight once"
    return found[0]


class JointDivergence:
    """The bounded divergence of a model with many changed weights from the same model as it was, on fixed data.

    The hidden states before every segment are kept, of the model as it is now, and the reference distributions:
    together 1.8 MB for each second of audio with NVIDIA's 13 M Conformer. `change` needs as much again for the new
    states.

    Args:
        model: The trained model. Its weights are changed in place; `restore` brings them back.
        data: Batches of ((N, T, F) features, (N,) valid frames).
        output: "encoder" or the output of a head; None for all those that recognition uses.

    Raises:
        MpqError: An output that the model does not have.
    """

    def __init__(self, model: AsrModel, data: Sequence[tuple[Tensor, Tensor]], output: str | None = None) -> None:
        self._tree = SegmentTree(model)
        self._outputs = _measured_outputs(self._tree, output)
        self._path = self._tree.path(*self._outputs)
        self._parameters = dict(model.named_parameters())
        self._originals: dict[str, Tensor] = {}
        with torch.inference_mode():
            self._batches = [OutputBatch(model, *batch) for batch in data]
            features = [batch.states for batch in self._batches]
            self._states = [own | new for own, new in zip(features, self._walk(features, self._path), strict=True)]
            self._references = [
                {output: batch.log_softmax(states[self._tree.ends[output]], output) for output in self._outputs}
                for batch, states in zip(self._batches, self._states, strict=True)
            ]
        self.frames = sum(len(rows) for references in self._references for rows in references.values())
        """Rows of the data, of all measured outputs: with CTC the valid encoder frames."""
        self.kl: Tensor = torch.zeros(self._utterances, dtype=torch.float64)
        """(utterances,) sums over the rows of each, of the model as it is now."""

    @property
    def mean(self) -> float:
        """The divergence of the model as it is now, nats per row."""
        return float(self.kl.sum()) / self.frames

    def measure(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns the value of `kl` with these weights, (utterances,) nats; the model stays as it is."""
        before = {name: self._parameters[name].data for name in weights}
        try:
            return self._measured(weights, keep=())[0]
        finally:
            for name, tensor in before.items():
                self._parameters[name].data = tensor

    def change(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the model these weights."""
        for name in weights:
            self._originals.setdefault(name, self._parameters[name].data)
        self.kl, states = self._measured(weights, keep=None)
        for own, new in zip(self._states, states, strict=True):
            own |= new

    def restore(self) -> None:
        """Gives the model its own weights back; nothing can be measured after that."""
        for name, tensor in self._originals.items():
            self._parameters[name].data = tensor

    @property
    def _utterances(self) -> int:
        return sum(len(batch.counts["encoder"]) for batch in self._batches)

    def _measured(
        self, weights: Mapping[str, Tensor], keep: Container[int] | None
    ) -> tuple[Tensor, list[dict[int, Any]]]:
        """Returns each utterance's sum, and for each batch the states that changed, as `SegmentTree.run`."""
        for name, tensor in weights.items():
            self._parameters[name].data = tensor
        owners = {owner(name, self._tree.segments) for name in weights}
        with torch.inference_mode():
            states = self._walk(self._states, self._tree.after(owners, self._path), keep)
            sums = torch.cat(
                [
                    _sums(batch, references, {output: (own | new)[self._tree.ends[output]] for output in references})
                    for batch, references, own, new in zip(
                        self._batches, self._references, self._states, states, strict=True
                    )
                ]
            )
        if not bool(sums.isfinite().all()):
            raise MpqError("expected a finite divergence of the quantized model, got NaN or infinity")
        return sums, states

    def _walk(
        self, states: Sequence[Mapping[int, Any]], path: Sequence[int], keep: Container[int] | None = None
    ) -> list[dict[int, Any]]:
        """Returns for each batch the states that these segments make."""
        pairs = zip(states, self._batches, strict=True)
        return [self._tree.run(own, path, batch.context.inputs, keep) for own, batch in pairs]


def bounded_kl(reference: Tensor, changed: Tensor) -> Tensor:
    """Returns the (M,) bounded KL(reference || changed) of each row."""
    return (reference.exp() * (reference - changed)).sum(dim=-1).clamp(max=BOUND)


def _sums(batch: OutputBatch, references: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> Tensor:
    """Returns the (N,) sums of the bounded divergence over the rows of each utterance in all outputs."""
    sums = []
    for output, reference in references.items():
        rows = bounded_kl(reference, batch.log_softmax(logits[output], output))
        parts = torch.split(rows, batch.counts[output].tolist())
        sums.append(torch.stack([part.sum() for part in parts]))
    return torch.stack(sums).sum(dim=0).cpu()
