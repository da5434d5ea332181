"""`mpq.sensitivity/1`: what each layer costs and does to the output at each bit-width.

Plain Python (no torch), so that the allocator and the tables work from the file alone. Reading validates: a fault names
the file, the key and what was expected there.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq.files import read_json, write_json
from mpq.quantization.spec import MAX_BITS, MIN_BITS
from mpq.validation import Reader, a_finite, a_positive, a_text, a_text_or_none, a_whole, an_object

SENSITIVITY_FORMAT = "mpq.sensitivity/1"


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
        method: "fisher": second order (`mpq.sensitivity.fisher`); "kl": exact, one layer at a time (Li et al. 2023, Eq.
            7).
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
        bits = tuple(sorted(reader.sequence("bits", a_width)))
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


def a_width(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(f"a whole number from {MIN_BITS} to {MAX_BITS}")
    return value


def _interval(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair [low, high]")
    return a_finite(value[0]), a_finite(value[1])
