"""What the steps hand to each other: frozen records that are read from and written to JSON.

Everything here is plain Python (no torch), so that the allocator and the reports work from the files alone. Reading
validates: a fault names the file, the key and what was expected there.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.files import read_json, write_json
from mpq.validation import Reader, a_finite, a_finite_or_none, a_positive, a_text, a_text_or_none, a_whole, an_object

SENSITIVITY_FORMAT = "mpq.sensitivity/1"
ALLOCATION_FORMAT = "mpq.allocation/1"

MIN_BITS, MAX_BITS = 1, 8
FLOAT_BITS = (16, 32)
"""Widths of a layer that is left unquantized: IEEE half and single precision."""

SCHEMES = ("symmetric", "asymmetric", "mulaw")
SCALE_DTYPES = ("float16", "float32")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class QuantSpec:
    """How one weight tensor is quantized. The defaults are the measured best of docs/quantizers.md.

    A weight of shape (C, ...) is seen as a matrix of C rows (output channels) and K columns (all that one output
    channel reads: input channels times kernel positions).

    Attributes:
        bits: Width of a code, 1 to 8.
        scheme: "symmetric": levels scale * {-(2^(n-1)-1) ... 2^(n-1)-1}; at 1 bit scale * {-1, 1}.
            "asymmetric": levels scale * ({0 ... 2^n-1} - zero_point) with an integer zero point.
            "mulaw": levels scale * 2^n centroids that lie closer together near zero (mpq.mu_law); "nearest" only.
        granularity: What shares a scale: "tensor", "channel" (a row), or "group:G" (G consecutive columns of a row;
            the last group of a row is shorter when G does not divide K).
        clip: How the range is chosen: "none" (all weights inside), "mse" or "mae" (searched for the smallest squared
            or absolute error), "percentile:P" (P in (50, 100], of the sorted weights).
        rounding: "nearest", or "gptq": errors are made up for, by the statistics of the layer's inputs (mpq.gptq).
        scale_dtype: "float16" or "float32": how scales are stored, and so what values they can take.
    """

    bits: int
    scheme: str = "asymmetric"
    granularity: str = "group:64"
    clip: str = "mse"
    rounding: str = "nearest"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise MpqError(f"bits: expected a whole number from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}")
        for key in ("granularity", "clip"):
            if not isinstance(getattr(self, key), str):
                raise MpqError(f"{key}: expected a string, got {getattr(self, key)!r}")
        for key, known in (("scheme", SCHEMES), ("rounding", ROUNDINGS), ("scale_dtype", SCALE_DTYPES)):
            if getattr(self, key) not in known:
                raise MpqError(f"{key}: expected {' or '.join(known)}, got {getattr(self, key)!r}")
        if self.scheme == "mulaw" and self.rounding == "gptq":
            raise MpqError(
                "rounding: scheme mulaw has no gptq, which needs evenly spaced levels; use --rounding nearest"
            )
        if self.granularity not in ("tensor", "channel") and not re.fullmatch(r"group:[1-9]\d*", self.granularity):
            raise MpqError(f"granularity: expected tensor, channel or group:G with G >= 1, got {self.granularity!r}")
        if self.clip not in ("none", "mse", "mae") and self.percentile is None:
            raise MpqError(f"clip: expected none, mse, mae or percentile:P with 50 < P <= 100, got {self.clip!r}")

    @property
    def group_size(self) -> int | None:
        """G of "group:G", None for the other granularities."""
        return int(self.granularity.removeprefix("group:")) if self.granularity.startswith("group:") else None

    @property
    def percentile(self) -> float | None:
        """P of "percentile:P", None for the other clips."""
        match = re.fullmatch(r"percentile:(\d+(?:\.\d*)?)", self.clip)
        value = float(match[1]) if match else math.nan
        return value if 50 < value <= 100 else None


@dataclass(frozen=True)
class LayerSensitivity:
    """One weight tensor: what it costs and what it does to the output at each bit-width.

    Attributes:
        name: The tensor's name in the user's checkpoint.
        kind: linear, conv1d, conv2d, embedding, ...
        shape: Of the weight.
        numel: Number of weights.
        size_bytes: {bits: bytes in the packed file}, scales and zero points included.
        kl: {bits: KL divergence per frame in nats that this layer alone is expected to cause}, as the table's `method`
            says; "kl" is Li et al. 2023, Eq. 7.
        group: Layers with the same group share one bit-width; None: on its own.
        float_bytes: Bytes when left unquantized; None in a file that does not say.
        interval: {bits: (low, high)}: 95 % confidence interval of kl over the choice of utterances; None without one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    size_bytes: dict[int, int]
    kl: dict[int, float]
    group: str | None = None
    float_bytes: int | None = None
    interval: dict[int, tuple[float, float]] | None = None


@dataclass(frozen=True)
class SensitivityTable:
    """`mpq.sensitivity/1`: all that `allocate` needs.

    Attributes:
        layers: One entry a tensor, in the model's order.
        bits: The widths measured, ascending; every layer has all of them.
        fixed_bytes: Everything in the packed file that is not a quantizable layer (header, norms, biases, tokenizer).
        model: {"path", "sha256", "architecture"}.
        data: {"path", "utterances", "frames"}.
        output: "ctc", "encoder" or "decoder": whose distribution the KL compares.
        method: "fisher": second order (`mpq.fisher`); "kl": exact, one layer at a time (Li et al. 2023, Eq. 7).
        quantizer: {"scheme", "granularity", "clip", "rounding", "scale_dtype", "rest_dtype"}; a file from elsewhere
            may hold fewer keys.
        fingerprint: Of model, data, output, method and quantizer; None in a file from elsewhere.
    """

    layers: tuple[LayerSensitivity, ...]
    bits: tuple[int, ...]
    fixed_bytes: int
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    output: str = "ctc"
    method: str = "kl"
    quantizer: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        layers = []
        for layer in self.layers:
            entry = {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "numel": layer.numel,
                "group": layer.group,
                "bytes": {str(bits): size for bits, size in layer.size_bytes.items()},
                "kl": {str(bits): kl for bits, kl in layer.kl.items()},
            }
            if layer.float_bytes is not None:
                entry["float_bytes"] = layer.float_bytes
            if layer.interval is not None:
                entry["interval"] = {str(bits): list(ends) for bits, ends in layer.interval.items()}
            layers.append(entry)
        return {
            "format": SENSITIVITY_FORMAT,
            "model": self.model,
            "data": self.data,
            "output": self.output,
            "method": self.method,
            "bits": list(self.bits),
            "quantizer": self.quantizer,
            "fingerprint": self.fingerprint,
            "fixed_bytes": self.fixed_bytes,
            "layers": layers,
        }

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "SensitivityTable":
        """Reads and validates a file that mpq, another tool or a hand wrote.

        Raises:
            MpqError: Not such a file; the message names the file, the key and what was expected.
        """
        reader = Reader(path, read_json(path, SENSITIVITY_FORMAT))
        bits = tuple(sorted(reader.sequence("bits", _bits)))
        if not bits or len(set(bits)) < len(bits):
            reader.fail("bits", "a non-empty list of different widths", bits)
        layers = []
        for entry in reader.objects("layers"):
            layer = LayerSensitivity(
                name=entry.get("name", a_text),
                kind=entry.get("kind", a_text, default=""),
                shape=entry.sequence("shape", a_whole),
                numel=entry.get("numel", a_positive),
                size_bytes=entry.mapping("bytes", bits, a_whole),
                kl=entry.mapping("kl", bits, a_finite),
                group=entry.get("group", a_text_or_none, default=None),
                float_bytes=entry.get("float_bytes", a_whole, default=None),
                interval=entry.mapping("interval", bits, _interval) if entry.has("interval") else None,
            )
            if math.prod(layer.shape) != layer.numel:
                entry.fail("numel", f"the product of shape, {math.prod(layer.shape)}", layer.numel)
            layers.append(layer)
        if not layers:
            reader.fail("layers", "at least one layer", [])
        names = [layer.name for layer in layers]
        if len(set(names)) < len(names):
            reader.fail("layers", "different names", next(name for name in names if names.count(name) > 1))
        return cls(
            layers=tuple(layers),
            bits=bits,
            fixed_bytes=reader.get("fixed_bytes", a_whole),
            model=reader.get("model", an_object, default={}),
            data=reader.get("data", an_object, default={}),
            output=reader.get("output", a_text, default="ctc"),
            method=reader.get("method", a_text, default="kl"),
            quantizer=reader.get("quantizer", an_object, default={}),
            fingerprint=reader.get("fingerprint", a_text_or_none, default=None),
        )


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
        measured_kl: The answer's measured divergence (bounded: `mpq.divergence`), nats per frame; None if not measured.
        measured_seconds: Audio that it was measured on, none of it used for the sensitivities; 0 if not measured.
        refinement: {"moves", "before", "after", "max_seconds", ...}: what `mpq.refine` did, and on how much audio,
            which is not that of measured_kl; empty without.
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


def _bits(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(f"a whole number from {MIN_BITS} to {MAX_BITS}")
    return value


def _bits_or_float(value: Any) -> int:
    if value in FLOAT_BITS and isinstance(value, int):
        return value
    try:
        return _bits(value)
    except ValueError as error:
        raise ValueError(f"{error}, or {' or '.join(map(str, FLOAT_BITS))}") from None


def _refinement(value: Any) -> dict[str, Any]:
    seconds = an_object(value).get("max_seconds")
    if value and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf):
        raise ValueError('an object with "max_seconds", a number above 0')
    return value


def _interval(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair [low, high]")
    return a_finite(value[0]), a_finite(value[1])


def _measured_point(value: Any) -> tuple[int, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("[bytes, predicted kl, measured kl]")
    return a_whole(value[0]), a_finite(value[1]), a_finite(value[2])


def _frontier_point(value: Any) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair [bytes, kl]")
    return a_whole(value[0]), a_finite(value[1])
