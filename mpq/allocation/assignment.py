"""An allocation applied to a checkpoint: the widths of its weights, how they are stored, and the size of the file.

Packing and fine-tuning share it: it checks that the allocation is for this model and that the file keeps its budget,
and finds the statistics that the rounding needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpq.allocation.records import Allocation
from mpq.artifact.file import HEADER_SLACK, check_names, fixed_bytes
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.quantization.spec import FLOAT_BITS
from mpq.runtime import memory_for
from mpq.sensitivity.calibration import CalibrationData, redraw
from mpq.sensitivity.statistics import cached_statistics, input_statistics

NO_AUDIO = "no calibration data are known; --data names some"


@dataclass(frozen=True)
class Assignment:
    """An allocation applied to a model.

    Attributes:
        bits: {weight name: width} of every weight.
        weight_format: The quantizer, and how weights are stored.
        size_bytes: The size of the packed file; the most where layers are entropy-coded, and None there if nothing was
            promised.
    """

    bits: dict[str, float]
    weight_format: WeightFormat
    size_bytes: int | None

    @property
    def needs_statistics(self) -> bool:
        """Whether the rounding looks at the layers' inputs."""
        return self.weight_format.spec.needs_statistics and any(bits not in FLOAT_BITS for bits in self.bits.values())


def assign(
    model: AsrModel, checkpoint: Path, sha256: str, allocation: Allocation, weight_format: WeightFormat, out: Path
) -> Assignment:
    """Returns an allocation applied to a float model.

    Args:
        model: The float model.
        checkpoint, sha256: The place of the model, for messages, and its fingerprint.
        allocation: The widths and the budget.
        weight_format: The quantizer, and how weights are stored.
        out: The packed file, for messages.

    Raises:
        MpqError: The allocation is for another model, or the file would be above its budget.
    """
    if allocation.model.get("sha256", sha256) != sha256:
        raise MpqError(f"{checkpoint}: the allocation was made for another checkpoint, {allocation.model.get('path')}")
    size = planned_bytes(model, allocation.bits, weight_format)
    if size is None or abs(size - allocation.predicted_bytes) <= HEADER_SLACK:
        size = allocation.predicted_bytes  # as promised, also where another version of the compressor made the promise
    if size > allocation.target_bytes:
        raise MpqError(
            f"{out}: the file would have {size} bytes, above the allocation's target of {allocation.target_bytes} (it "
            f"predicted {allocation.predicted_bytes}); its sizes are of another model or quantizer: run mpq "
            "sensitivity and mpq allocate for this one"
        )
    return Assignment(dict(allocation.bits), weight_format, size)


def planned_bytes(model: AsrModel, bits: Mapping[str, float], weight_format: WeightFormat) -> int | None:
    """Returns the size of the packed file of a model with these widths; None where it depends on the codes.

    Raises:
        MpqError: `bits` has missing or unknown names.
    """
    refs = model.weights()
    check_names(refs, bits)
    if weight_format.spec.record.is_entropy_coded:
        return None
    return fixed_bytes(model, weight_format) + sum(
        layer_bytes(ref.shape, bits[ref.name], weight_format) for ref in refs
    )


def recall(model: AsrModel, allocation: Allocation, data: Path | None) -> tuple[CalibrationData | None, str]:
    """Returns the audio that an allocation was made with; or None, and why it is not there.

    Args:
        model: The float model.
        allocation: The allocation, which says which audio it was made with.
        data: The place of the audio now; None: where it was.

    Raises:
        MpqError: `data` is not that audio.
    """
    if "sha256" not in allocation.data:
        return None, NO_AUDIO
    try:
        return redraw(model, allocation.data, data), ""
    except MpqError as error:
        if data is not None:
            raise
        return None, str(error).splitlines()[0] + "; --data says where they are now"


def recalled_statistics(
    model: AsrModel,
    sha256: str,
    drawn: CalibrationData | None,
    allocation: Allocation | None,
    weight_format: WeightFormat,
    note: str,
    out: Path,
    quiet: bool,
) -> dict[str, Tensor]:
    """Returns the statistics that the rounding needs, collected from audio or out of the cache.

    Args:
        model, sha256: The float model and its fingerprint.
        drawn: The audio; None if it is not there.
        allocation: The allocation, which says whose statistics the cache may have; None without one.
        weight_format: The quantizer, which names the rounding.
        note: The reason why there is no audio.
        out: The file that is to be written, for messages.
        quiet: Show no progress.

    Raises:
        MpqError: Neither audio nor cached statistics.
    """
    if drawn is not None:
        with memory_for(f"{drawn.path}: the statistics"):
            return input_statistics(model, sha256, drawn, weight_format, quiet)
    known: dict[str, Any] = allocation.data if allocation else {}
    grams = cached_statistics(model, sha256, known.get("sha256", ""), weight_format) if allocation else None
    if grams is None:
        raise MpqError(f"{out}: rounding {weight_format.spec.rounding} needs calibration data: {note}")
    return grams
