"""`mpq.allocation/1`: the bit-width of every layer, and the frontier that it was chosen from.

Plain Python (no torch). Reading validates: a fault names the file, the key and what was expected there.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq.files import read_json, write_json
from mpq.quantization.spec import FLOAT_BITS
from mpq.sensitivity.records import a_width
from mpq.validation import Reader, a_finite, a_finite_or_none, a_text, a_text_or_none, a_whole, an_object

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
        frontier_note: How complete the frontier is, in one sentence.
        quantizer, model, data, output, fingerprint: Copied from the sensitivity file.
        measured: ((bytes, predicted kl, measured kl), ...) of whole models that were measured, ascending in bytes.
        measured_kl: The answer's measured divergence (bounded: `mpq.sensitivity.divergence`), nats per frame; None if
            not measured.
        measured_seconds: Audio that it was measured on, none of it used for the sensitivities; 0 if not measured.
        refinement: {"moves", "before", "after", "max_seconds", ...}: what `mpq.allocation.refine` did, and on how much
            audio, which is not that of measured_kl; empty without.
    """

    bits: dict[str, int]
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
        reader = Reader(path, read_json(path, ALLOCATION_FORMAT))
        bits: dict[str, int] = {}
        for entry in reader.objects("layers"):
            name = entry.get("name", a_text)
            if name in bits:
                entry.fail("name", "different names", name)
            bits[name] = entry.get("bits", _bits_or_float)
        return cls(
            bits=bits,
            target_bytes=reader.get("target_bytes", a_whole),
            predicted_bytes=reader.get("predicted_bytes", a_whole),
            predicted_kl=reader.get("predicted_kl", a_finite),
            average_bits=reader.get("average_bits", a_finite),
            frontier=tuple(reader.sequence("frontier", _frontier_point, default=())),
            frontier_note=reader.get("frontier_note", a_text, default=""),
            quantizer=reader.get("quantizer", an_object, default={}),
            model=reader.get("model", an_object, default={}),
            data=reader.get("data", an_object, default={}),
            output=reader.get("output", a_text, default="ctc"),
            measured=tuple(reader.sequence("measured", _measured_point, default=())),
            measured_kl=reader.get("measured_kl", a_finite_or_none, default=None),
            measured_seconds=reader.get("measured_seconds", a_finite, default=0.0),
            refinement=reader.get("refinement", _refinement, default={}),
            fingerprint=reader.get("fingerprint", a_text_or_none, default=None),
        )


def _bits_or_float(value: Any) -> int:
    if value in FLOAT_BITS and isinstance(value, int):
        return value
    try:
        return a_width(value)
    except ValueError as error:
        raise ValueError(f"{error}, or {' or '.join(map(str, FLOAT_BITS))}") from None


def _refinement(value: Any) -> dict[str, Any]:
    seconds = an_object(value).get("max_seconds")
    if value and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf):
        raise ValueError('an object with "max_seconds", a number above 0')
    return value


def _measured_point(value: Any) -> tuple[int, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("[bytes, predicted kl, measured kl]")
    return a_whole(value[0]), a_finite(value[1]), a_finite(value[2])


def _frontier_point(value: Any) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair [bytes, kl]")
    return a_whole(value[0]), a_finite(value[1])
