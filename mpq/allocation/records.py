"""`mpq.allocation/1`: the bit-width of every layer, and the frontier that it was chosen from.

Plain Python (no torch). Reading validates: a fault names the file, the key and what was expected there.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, field_validator
from pydantic_core import PydanticCustomError

from mpq.errors import MpqError
from mpq.faults import Count, JsonObject, Number, Text, check_different, checked
from mpq.files import read_json, write_json
from mpq.quantization.spec import FLOAT_BITS, QuantSpec, as_width, is_width, widths_of

ALLOCATION_FORMAT = "mpq.allocation/1"


@dataclass(frozen=True)
class Allocation:
    """`mpq.allocation/1`: the bit-width of every layer, and the frontier that it was chosen from.

    Attributes:
        bits: {layer name: bits}; 16 or 32 is a layer left unquantized.
        target_bytes: The budget for the packed file.
        predicted_bytes: Size of the packed file.
        predicted_kl: Sum of the layers' divergences (Li et al. 2023, Eq. 8), nats per frame.
        average_bits: Code bits per weight, weighted by numel; scales and zero points are not counted.
        frontier: ((bytes, kl), ...), ascending in bytes, strictly falling in kl.
        frontier_note: A sentence that says how complete the frontier is.
        quantizer, model, data, output, fingerprint: Copied from the sensitivity file.
        measured: ((bytes, predicted kl, measured kl), ...) of whole models that were measured, ascending in bytes.
        measured_kl: The answer's measured divergence (bounded: `mpq.sensitivity.divergence`), nats per frame; None if
            not measured.
        measured_seconds: Audio that it was measured on, none of it used for the sensitivities; 0 if not measured.
        refinement: {"moves", "before", "after", "max_seconds", ...}: the moves of `mpq.allocation.refine` and the
            audio that decided on them, which is not that of measured_kl; empty if it was not refined.
    """

    bits: dict[str, float]
    target_bytes: int
    predicted_bytes: int
    predicted_kl: float
    average_bits: float
    frontier: tuple[tuple[int, float], ...]
    frontier_note: str = ""
    quantizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    output: str = "ctc"
    fingerprint: str | None = None
    measured: tuple[tuple[int, float, float], ...] = ()
    measured_kl: float | None = None
    measured_seconds: float = 0.0
    refinement: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": ALLOCATION_FORMAT,
            "target_bytes": self.target_bytes,
            "predicted_bytes": self.predicted_bytes,
            "predicted_kl": self.predicted_kl,
            "average_bits": self.average_bits,
            "measured_kl": self.measured_kl,
            "measured_seconds": self.measured_seconds,
            "refinement": self.refinement,
            "model": self.model,
            "data": self.data,
            "output": self.output,
            "quantizer": self.quantizer,
            "fingerprint": self.fingerprint,
            "layers": [{"name": name, "bits": bits} for name, bits in self.bits.items()],
            "frontier": [list(point) for point in self.frontier],
            "frontier_note": self.frontier_note,
            "measured": [list(point) for point in self.measured],
        }

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Allocation":
        """Reads and validates a file; raises MpqError that names the file, the key and what was expected."""
        file = checked(_File, read_json(path, ALLOCATION_FORMAT), path)
        bits = {layer.name: as_width(layer.bits) for layer in file.layers}
        scheme = file.quantizer.get("scheme", QuantSpec.scheme)
        for index, width in enumerate(bits.values()):
            if width not in FLOAT_BITS and not is_width(width, scheme):
                expected = f"{widths_of(scheme)}, or {' or '.join(map(str, FLOAT_BITS))}"
                raise MpqError(f"{path}: layers[{index}].bits: expected {expected}, got {width}")
        return cls(
            bits=bits,
            target_bytes=file.target_bytes,
            predicted_bytes=file.predicted_bytes,
            predicted_kl=file.predicted_kl,
            average_bits=file.average_bits,
            frontier=tuple(file.frontier),
            frontier_note=file.frontier_note,
            quantizer=file.quantizer,
            model=file.model,
            data=file.data,
            output=file.output,
            fingerprint=file.fingerprint,
            measured=tuple(file.measured),
            measured_kl=file.measured_kl,
            measured_seconds=file.measured_seconds,
            refinement=file.refinement,
        )


def _a_refinement(refinement: dict[str, Any]) -> dict[str, Any]:
    seconds = refinement.get("max_seconds")
    if refinement and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf):
        raise PydanticCustomError("refinement", 'an object with "max_seconds", a number above 0')
    return refinement


class _Layer(JsonObject):
    """An entry of "layers"."""

    name: Text
    bits: Number


class _File(JsonObject):
    """The whole file."""

    layers: list[_Layer]
    target_bytes: Count
    predicted_bytes: Count
    predicted_kl: Number
    average_bits: Number
    frontier: list[Annotated[tuple[Count, Number], Strict(False)]] = Field(default_factory=list)
    frontier_note: Text = ""
    quantizer: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    output: Text = "ctc"
    fingerprint: Text | None = None
    measured: list[Annotated[tuple[Count, Number, Number], Strict(False)]] = Field(default_factory=list)
    measured_kl: Number | None = None
    measured_seconds: Number = 0.0
    refinement: Annotated[dict[str, Any], AfterValidator(_a_refinement)] = Field(default_factory=dict)

    @field_validator("layers")
    @classmethod
    def _have_names_of_their_own(cls, layers: list[_Layer]) -> list[_Layer]:
        check_different(layer.name for layer in layers)
        return layers
