"""The true effect of an allocation: the divergence of the model with all layers quantized together.

Sums of one-layer divergences leave out the effects of layers on each other. So the model is quantized as an allocation
says and its divergence measured: that of all outputs that recognition uses (those of all heads), whatever the output of
the sensitivities.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mpq.allocation.records import Allocation
from mpq.artifact.weights import WeightFormat, quantize_layer
from mpq.journal import Journal
from mpq.models.base import AsrModel
from mpq.progress import progress
from mpq.sensitivity.calibration import BATCH_SECONDS, CalibrationData, in_batches
from mpq.sensitivity.divergence import JointDivergence

Point = tuple[int, float, float]
"""(bytes, predicted divergence, measured divergence), the divergences in nats per frame."""


def rounded_weights(
    model: AsrModel, weight_format: WeightFormat, widths: Sequence[float], grams: Mapping[str, Tensor], quiet: bool
) -> dict[str, dict[float, Tensor]]:
    """Returns {weight name: {bits: the weight that the packed file gives back}}, unquantized ones at 16 and 32 bits.

    They take 4 bytes x widths for each weight.

    Args:
        model: The float model.
        weight_format: The quantizer, and how weights are stored.
        widths: The widths that are measured.
        grams: The statistics that the rounding needs (`mpq.sensitivity.statistics.input_statistics`).
        quiet: Show no progress.
    """
    state, refs = model.state_dict(), model.weights()
    found: dict[str, dict[float, Tensor]] = {}
    with progress("rounding", len(refs), quiet, "layers") as advance:
        for ref in refs:
            weight = state[ref.name].clone()
            rounded = quantize_layer(ref.name, weight, weight_format, widths, grams)
            found[ref.name] = dict(zip(widths, rounded, strict=True))
            found[ref.name] |= {16: weight.half().float(), 32: weight}
            advance(1)
    return found


@contextmanager
def measuring(model: AsrModel, data: CalibrationData) -> Iterator[JointDivergence]:
    """Yields the divergence of a model from itself as it is now; it has its own weights again afterwards."""
    joint = JointDivergence(model, in_batches(model, data, BATCH_SECONDS))
    try:
        yield joint
    finally:
        joint.restore()


class Meter:
    """Measures models by their bit-widths, each only once.

    Args:
        joint: Measures the model.
        weights: The weights at all widths, from `rounded_weights`.
        journal: Keeps the measurements and the time that they took; None keeps nothing.
        clock: Returns the time in seconds.

    Attributes:
        seconds: The time that the measurements took, those of the journal included.
    """

    def __init__(
        self,
        joint: JointDivergence,
        weights: Mapping[str, Mapping[float, Tensor]],
        journal: Journal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.joint, self.weights, self.journal, self.clock = joint, weights, journal, clock
        self.bits: dict[str, float] = {}  # of the model as it is now
        self.known: dict[str, Tensor] = {}
        self.seconds = 0.0
        for entry in journal.read() if journal else ():
            self.known[entry["key"]] = torch.tensor(entry["kl"], dtype=torch.float64)
            self.seconds += entry["seconds"]

    def is_known(self, bits: Mapping[str, float]) -> bool:
        """Returns whether the model with these widths was measured already, so that it takes no time."""
        return _key(bits) in self.known

    def kl(self, bits: Mapping[str, float]) -> Tensor:
        """Returns the (utterances,) divergences, summed over rows, of the model with these widths."""
        key = _key(bits)
        if key not in self.known:
            start = self.clock()
            self.known[key] = self.joint.measure(self._changes(bits))
            seconds = self.clock() - start
            self.seconds += seconds
            if self.journal:
                self.journal.append({"key": key, "kl": self.known[key].tolist(), "seconds": seconds})
        return self.known[key]

    def move_to(self, bits: Mapping[str, float]) -> None:
        """Makes these the widths that others are measured from."""
        self.joint.change(self._changes(bits))
        self.bits = dict(bits)

    def per_frame(self, kl: Tensor) -> float:
        """Returns the mean over all rows of the (utterances,) divergences that `kl` returns."""
        return float(kl.sum()) / self.joint.frames

    def point(self, allocation: Allocation) -> Point:
        """Returns the size of an allocation and its divergences, predicted and measured."""
        return allocation.predicted_bytes, allocation.predicted_kl, self.per_frame(self.kl(allocation.bits))

    def _changes(self, bits: Mapping[str, float]) -> dict[str, Tensor]:
        return {name: self.weights[name][width] for name, width in bits.items() if self.bits.get(name) != width}


def _key(bits: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(sorted(bits.items())).encode()).hexdigest()
