"""From a float checkpoint and bit-widths to the packed file, checked against its budget.

The divergence of the file's output is measured, with all layers quantized together, on audio that the sensitivities
have not seen: sums of one-layer divergences say little about it (docs/rounding.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpq.allocation.assignment import NO_AUDIO, Assignment, assign, planned_bytes, recall, recalled_statistics
from mpq.allocation.records import Allocation
from mpq.artifact.file import read_artifact, write_artifact
from mpq.artifact.parts import fold_as_stored
from mpq.artifact.weights import WeightFormat, unreached
from mpq.errors import MpqError
from mpq.files import check_output
from mpq.loading import model_files, open_float_model
from mpq.models.base import AsrModel
from mpq.progress import progress
from mpq.quantization.spec import FLOAT_BITS
from mpq.runtime import choose_device, memory_for
from mpq.sensitivity.calibration import (
    BATCH_SECONDS,
    CALIBRATION_SECONDS,
    HELD_OUT_SECONDS,
    CalibrationData,
    further,
    in_batches,
    unseen,
    varied,
)
from mpq.sensitivity.divergence import output_divergence


@dataclass(frozen=True)
class PackResult:
    """The file that `pack` wrote.

    Attributes:
        path: The file.
        size_bytes: The file's size.
        predicted_bytes: The size that the allocation predicted; None without an allocation.
        target_bytes: The budget; None without an allocation.
        nominal_bytes: The size as papers count it: every parameter at its width, no scales, tokenizer and header.
        float_bytes: The size of all parameters in float32, for the ratio.
        average_bits: Code bits per weight.
        scheme: The kind of the levels.
        rounding: "nearest" or "gptq".
        unreached: The layers that were rounded to nearest all the same, because no calibration data reach them.
        predicted_kl: The divergence that the allocation predicted; None without an allocation.
        measured_kl: The bounded divergence of the file's outputs from the checkpoint's (`mpq.sensitivity.divergence`),
            nats per row: a frame for CTC, a token for an attention decoder; None if it was not measured.
        measured_on: The audio that it was measured on, or why it was not measured.
    """

    path: Path
    size_bytes: int
    predicted_bytes: int | None
    target_bytes: int | None
    nominal_bytes: int
    float_bytes: int
    average_bits: float
    rounding: str
    predicted_kl: float | None
    measured_kl: float | None
    measured_on: str
    scheme: str
    unreached: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """The factor by which the file is smaller than the float32 parameters."""
        return self.float_bytes / self.size_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "mpq.pack/1",
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "predicted_bytes": self.predicted_bytes,
            "target_bytes": self.target_bytes,
            "nominal_bytes": self.nominal_bytes,
            "float_bytes": self.float_bytes,
            "ratio": self.ratio,
            "average_bits": self.average_bits,
            "scheme": self.scheme,
            "rounding": self.rounding,
            "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl,
            "measured_on": self.measured_on,
            **({"unreached": list(self.unreached)} if self.unreached else {}),
        }


def pack(
    checkpoint: Path,
    out: Path,
    allocation: Allocation | None = None,
    bits: float | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    *,
    data: Path | None = None,
    max_seconds: float | None = CALIBRATION_SECONDS,
    seed: int = 0,
    channel: str = "error",
    skip_bad: bool = False,
    held_out_seconds: float = HELD_OUT_SECONDS,
    quiet: bool = True,
) -> PackResult:
    """Writes the packed file `out`; nothing is left under that name if it would be above the budget.

    Args:
        checkpoint: The float model.
        out: The file to write.
        allocation: The bit-width of every layer, the quantizer and the audio that it was made for.
        bits: One width for all layers instead, 1 to 8; with neither, the weights stay in `rest_dtype`.
        options: Quantizer options ("scheme", ...) that were asked for; they may not contradict the allocation's.
            Without an allocation, "rounding" is "gptq" by default if there is `data` and the scheme has it.
        device: As in `mpq.runtime.choose_device`.
        data: Calibration audio; with an allocation it need not be given where the file that this names is still there,
            and has to be the same audio.
        max_seconds, seed, channel, skip_bad: The part of `data` to use without an allocation, as in
            `mpq.sensitivity.calibration.draw`.
        held_out_seconds: The most audio that the file's divergence is measured on.
        quiet: Show no progress.

    Raises:
        MpqError: Bad input of any kind, an allocation for another model, or a file above its budget.
    """
    check_output(out, *model_files(checkpoint), data)
    weight_format = _weight_format(allocation, bits, dict(options or {}), data)
    opened = open_float_model(checkpoint, choose_device(device), "pack")
    model, sha256 = opened.model, opened.sha256
    fold_as_stored(model, weight_format)
    if allocation is not None:
        assigned = assign(model, opened.path, sha256, allocation, weight_format, out)
    else:
        widths = {ref.name: bits or weight_format.float_bits for ref in model.weights()}
        assigned = Assignment(widths, weight_format, planned_bytes(model, widths, weight_format))
    drawn, note = None, NO_AUDIO
    if allocation is not None and "sha256" in allocation.data:
        drawn, note = recall(model, allocation, data)
    elif data is not None:
        untouched = unseen(model, data, seed, channel, skip_bad)
        drawn = further(model, untouched, max_seconds) if assigned.needs_statistics else untouched
        drawn = varied(model, drawn) if weight_format.spec.record.is_entropy_coded else drawn
    grams: dict[str, Tensor] = {}
    if assigned.needs_statistics:
        grams = recalled_statistics(model, sha256, drawn, allocation, weight_format, note, out, quiet)
    with progress("packing", len(assigned.bits), quiet, "layers") as advance:
        size = write_artifact(out, model, assigned.bits, weight_format, assigned.size_bytes, grams, advance)
    measured = (None, note) if drawn is None else _measured(model, out, drawn, allocation, held_out_seconds)
    rounded = [name for name, width in assigned.bits.items() if width not in FLOAT_BITS]
    missed = unreached(rounded, weight_format, grams)
    return replace(_result(model, out, size, assigned, allocation, *measured), unreached=missed)


def _result(
    model: AsrModel,
    out: Path,
    size_bytes: int,
    assigned: Assignment,
    allocation: Allocation | None,
    measured_kl: float | None,
    measured_on: str,
) -> PackResult:
    """Returns the figures of the file that was written."""
    refs, parameters = model.weights(), model.parameter_counts()["total"]
    weights = sum(ref.numel for ref in refs)
    code_bits = sum(assigned.bits[ref.name] * ref.numel for ref in refs)
    rest_bits = assigned.weight_format.float_bits * (parameters - weights)
    return PackResult(
        path=out,
        size_bytes=size_bytes,
        predicted_bytes=allocation.predicted_bytes if allocation else None,
        target_bytes=allocation.target_bytes if allocation else None,
        nominal_bytes=math.ceil((code_bits + rest_bits) / 8),
        float_bytes=4 * parameters,
        average_bits=code_bits / weights,
        scheme=assigned.weight_format.spec.scheme,
        rounding=assigned.weight_format.spec.rounding,
        predicted_kl=allocation.predicted_kl if allocation else None,
        measured_kl=measured_kl,
        measured_on=measured_on,
    )


def _weight_format(
    allocation: Allocation | None, bits: float | None, options: dict[str, Any], data: Path | None
) -> WeightFormat:
    """Returns the quantizer: that of the allocation, or without one that of the options."""
    if allocation is None:
        weight_format = WeightFormat.from_options(options, has_data=bool(data and bits))
        replace(weight_format.spec, bits=8 if bits is None else bits)  # refuses other widths
        return weight_format
    for key, value in options.items():
        if key in allocation.quantizer and allocation.quantizer[key] != value:
            raise MpqError(
                f"--{key.replace('_', '-')} {value}: the allocation was made for {allocation.quantizer[key]}; "
                "leave the option out, or measure and allocate again with it"
            )
    return WeightFormat.from_json(allocation.quantizer | options)


def _measured(
    model: AsrModel, out: Path, drawn: CalibrationData, allocation: Allocation | None, held_out_seconds: float
) -> tuple[float | None, str]:
    """Returns the divergence of the packed file's output, and the audio that it was measured on, or why it was not."""
    try:
        if allocation is not None and allocation.refinement:
            drawn = further(model, drawn, allocation.refinement["max_seconds"])
        fresh = further(model, drawn, held_out_seconds)
        if not fresh.utterances:
            return None, f"{drawn.path} has no audio left that was not used for calibration"
        packed = read_artifact(out).to(next(model.parameters()).device)
        with memory_for(f"{drawn.path}: batches of {BATCH_SECONDS:g} s"):
            kl = output_divergence(model, packed, in_batches(model, fresh, BATCH_SECONDS))
    except MpqError as error:  # the file is whole all the same
        return None, str(error)
    return kl, f"{sum(fresh.durations):.0f} s of {drawn.path} that the sensitivities have not seen"
