"""What the steps hand to each other: frozen records that are read from and written to JSON.

Everything here is plain Python (no torch), so that the allocator and the reports work from the files alone. Reading
validates: a fault names the file, the key and what was expected there.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.files import read_json, write_json
from mpq.validation import Reader, a_finite, a_positive, a_text, a_text_or_none, a_whole, an_object

SENSITIVITY_FORMAT = "mpq.sensitivity/1"
ALLOCATION_FORMAT = "mpq.allocation/1"
COMPARISON_FORMAT = "mpq.comparison/1"

MIN_BITS, MAX_BITS = 1, 8
FLOAT_BITS = (16, 32)
"""Widths of a layer that is left unquantized: IEEE half and single precision."""

SCHEMES = ("symmetric", "asymmetric")
SCALE_DTYPES = ("float16", "float32")
ROUNDINGS = ("nearest",)


@dataclass(frozen=True)
class QuantSpec:
    """How one weight tensor is quantized. The defaults are the measured best of docs/quantizers.md.

    A weight of shape (C, ...) is seen as a matrix of C rows (output channels) and K columns (all that one output
    channel reads: input channels times kernel positions).

    Attributes:
        bits: Width of a code, 1 to 8.
        scheme: "symmetric": levels scale * {-(2^(n-1)-1) ... 2^(n-1)-1}; at 1 bit scale * {-1, 1}.
            "asymmetric": levels scale * ({0 ... 2^n-1} - zero_point) with an integer zero point.
        granularity: What shares a scale: "tensor", "channel" (a row), or "group:G" (G consecutive columns of a row;
            the last group of a row is shorter when G does not divide K).
        clip: How the range is chosen: "none" (all weights inside), "mse" or "mae" (searched for the smallest squared
            or absolute error), "percentile:P" (P in (50, 100], of the sorted weights).
        rounding: "nearest".
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
        kl: {bits: mean KL divergence per frame in nats, with this layer alone quantized} (Li et al. 2023, Eq. 7).
        group: Layers with the same group share one bit-width; None: on its own.
        float_bytes: Bytes when left unquantized; None in a file that does not say.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    size_bytes: dict[int, int]
    kl: dict[int, float]
    group: str | None = None
    float_bytes: int | None = None


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
        method: "kl" is Li et al. 2023, Eq. 7.
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
        quantizer, model, fingerprint: Copied from the sensitivity file.
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
    fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": ALLOCATION_FORMAT,
            "target_bytes": self.target_bytes,
            "predicted_bytes": self.predicted_bytes,
            "predicted_kl": self.predicted_kl,
            "average_bits": self.average_bits,
            "model": self.model,
            "quantizer": self.quantizer,
            "fingerprint": self.fingerprint,
            "layers": [{"name": name, "bits": bits} for name, bits in self.bits.items()],
            "frontier": [list(point) for point in self.frontier],
            "frontier_note": self.frontier_note,
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
            fingerprint=reader.get("fingerprint", a_text_or_none, default=None),
        )


@dataclass(frozen=True)
class SystemScore:
    """One system's word errors over the whole corpus, as sclite's Sum row counts them.

    Attributes:
        name: What the reports call the system.
        wer: (sub + del + ins) / (corr + sub + del); 0 without reference words.
        correct, substitutions, deletions, insertions: Words.
        sentence_errors: Utterances with at least one error.
    """

    name: str
    wer: float
    correct: int
    substitutions: int
    deletions: int
    insertions: int
    sentence_errors: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "wer": self.wer,
            "corr": self.correct,
            "sub": self.substitutions,
            "del": self.deletions,
            "ins": self.insertions,
            "sentence_errors": self.sentence_errors,
        }


@dataclass(frozen=True)
class MapssweResult:
    """The matched pairs test; differences are (errors of a) - (errors of b) per segment.

    Attributes:
        segments: Number of segments.
        mean, std: Of the differences (std with n - 1).
        z: mean / (std / sqrt(segments)); 0 when the differences are all equal; None without segments.
        p: Exact two-tailed normal probability of z; None without segments.
        p_sctk: The probability as sc_stats prints it (z floored to 0.01); None without segments.
        significant: |z| above the critical value, strictly (1.960 at alpha 0.05, as sc_stats).
        better: "a", "b", or None when not significant.
        note: Why there is no verdict or why to doubt it, else "".
    """

    segments: int
    mean: float
    std: float
    z: float | None
    p: float | None
    p_sctk: float | None
    significant: bool
    better: str | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """`mpq.comparison/1`: two systems on the same utterances; a is the baseline, b the compressed one.

    Attributes:
        alpha: Level of the tests.
        utterances, words: In the reference.
        a, b: The systems' scores.
        mapsswe: The matched pairs test.
        mcnemar: {"a_only_wrong", "b_only_wrong", "p", "significant"}: exact binomial test on utterances.
        bootstrap: {"difference", "low", "high", "level", "resamples", "seed"}: WER of b minus WER of a and its
            percentile interval from resampled utterances.
        changed: Utterances whose hypotheses differ: {"utt_id", "ref", "a", "b", "errors_a", "errors_b"} each.
        lossless: b is not significantly worse than a (MAPSSWE).
    """

    alpha: float
    utterances: int
    words: int
    a: SystemScore
    b: SystemScore
    mapsswe: MapssweResult
    mcnemar: dict[str, Any]
    bootstrap: dict[str, Any]
    changed: tuple[dict[str, Any], ...]
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "format": COMPARISON_FORMAT,
            "alpha": self.alpha,
            "utterances": self.utterances,
            "words": self.words,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "mapsswe": self.mapsswe.to_json(),
            "mcnemar": self.mcnemar,
            "bootstrap": self.bootstrap,
            "lossless": self.lossless,
            "changed": list(self.changed),
        }

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())


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


def _frontier_point(value: Any) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair [bytes, kl]")
    return a_whole(value[0]), a_finite(value[1])
