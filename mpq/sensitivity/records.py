"""`mpq.sensitivity/1`: the bytes of each layer, and its effect on the output, at each bit-width.

Plain Python (no torch), so that the allocator and the tables work from the file alone. Reading validates: a fault names
the file, the key and what was expected there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, Strict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from mpq.errors import MpqError
from mpq.faults import Count, JsonObject, Number, Text, check_different, checked
from mpq.files import read_json, write_json
from mpq.quantization.spec import QuantSpec, as_width, is_width, widths_of

SENSITIVITY_FORMAT = "mpq.sensitivity/1"


@dataclass(frozen=True)
class LayerSensitivity:
    """One weight tensor: its bytes, and its effect on the output, at each bit-width.

    Attributes:
        name: The tensor's name in the user's checkpoint.
        kind: linear, conv1d, conv2d, embedding, ...
        shape: The tensor's shape.
        numel: The number of its weights.
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
    size_bytes: dict[float, int]
    kl: dict[float, float]
    group: str | None = None
    float_bytes: int | None = None
    interval: dict[float, tuple[float, float]] | None = None


@dataclass(frozen=True)
class SensitivityTable:
    """`mpq.sensitivity/1`: all that `allocate` needs.

    Attributes:
        layers: One entry a tensor, in the model's order.
        bits: The widths measured, ascending; every layer has all of them.
        fixed_bytes: Everything in the packed file that is not a quantizable layer (header, norms, biases, tokenizer).
        model: {"path", "sha256", "architecture"}.
        data: {"path", "utterances", "frames"}.
        output: "ctc", "encoder" or "decoder": the output whose distributions the KL compares.
        method: "fisher": second order (`mpq.sensitivity.fisher`); "kl": exact, one layer at a time (Li et al. 2023, Eq.
            7).
        quantizer: {"scheme", "granularity", "clip", "rounding", "scale_dtype", "rest_dtype"}; a file from elsewhere
            may hold fewer keys.
        fingerprint: Digest of model, data, output, method and quantizer; None in a file from elsewhere.
        unreached: The layers that are rounded to nearest, whatever the rounding is, because no data reach them.
    """

    layers: tuple[LayerSensitivity, ...]
    bits: tuple[float, ...]
    fixed_bytes: int
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    output: str = "ctc"
    method: str = "kl"
    quantizer: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    unreached: tuple[str, ...] = ()

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
            **({"unreached": list(self.unreached)} if self.unreached else {}),
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
        file = checked(_File, read_json(path, SENSITIVITY_FORMAT), path)
        bits = tuple(sorted(file.bits))
        layers = []
        for index, entry in enumerate(file.layers):
            where = f"{path}: layers[{index}]"
            layer = LayerSensitivity(
                name=entry.name,
                kind=entry.kind,
                shape=tuple(entry.shape),
                numel=entry.numel,
                size_bytes=_at(bits, entry.bytes, f"{where}.bytes"),
                kl=_at(bits, entry.kl, f"{where}.kl"),
                group=entry.group,
                float_bytes=entry.float_bytes,
                interval=None if entry.interval is None else _at(bits, entry.interval, f"{where}.interval"),
            )
            layers.append(layer)
        return cls(
            layers=tuple(layers),
            bits=bits,
            fixed_bytes=file.fixed_bytes,
            model=file.model,
            data=file.data,
            output=file.output,
            method=file.method,
            quantizer=file.quantizer,
            fingerprint=file.fingerprint,
            unreached=tuple(file.unreached),
        )


def _a_width(number: float, info: ValidationInfo) -> float:
    scheme = info.data.get("quantizer", {}).get("scheme", QuantSpec.scheme)
    if not is_width(as_width(number), scheme):
        raise PydanticCustomError("width", "{expected}", {"expected": widths_of(scheme)})
    return as_width(number)


class _Layer(JsonObject):
    """An entry of "layers"."""

    name: Text
    kind: Text = ""
    shape: list[Count]
    numel: Annotated[int, Field(ge=1)]
    bytes: dict[str, Count]
    kl: dict[str, Number]
    group: Text | None = None
    float_bytes: Count | None = None
    interval: dict[str, Annotated[tuple[Number, Number], Strict(False)]] | None = None

    @field_validator("numel")
    @classmethod
    def _is_the_shapes(cls, numel: int, info: ValidationInfo) -> int:
        if "shape" in info.data and numel != math.prod(info.data["shape"]):
            product = math.prod(info.data["shape"])
            raise PydanticCustomError("numel", "the product of shape, {product}", {"product": product})
        return numel


class _File(JsonObject):
    """The whole file."""

    quantizer: dict[str, Any] = Field(default_factory=dict)  # before bits, whose numbers depend on it
    bits: list[Annotated[Number, AfterValidator(_a_width)]]
    fixed_bytes: Count
    layers: list[_Layer]
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    output: Text = "ctc"
    method: Text = "kl"
    fingerprint: Text | None = None
    unreached: list[Text] = Field(default_factory=list)

    @field_validator("bits")
    @classmethod
    def _differ(cls, bits: list[float]) -> list[float]:
        if not bits or len(set(bits)) < len(bits):
            raise PydanticCustomError("bits", "a non-empty list of different widths")
        return bits

    @field_validator("layers")
    @classmethod
    def _have_names_of_their_own(cls, layers: list[_Layer]) -> list[_Layer]:
        if not layers:
            raise PydanticCustomError("layers", "at least one layer")
        check_different(layer.name for layer in layers)
        return layers


Value = TypeVar("Value")


def _at(bits: tuple[float, ...], values: Mapping[str, Value], where: str) -> dict[float, Value]:
    """Returns {width: value} of values whose keys are the widths as text, and raises MpqError where one is missing."""
    known = {**{f"{width:.1f}": width for width in bits}, **{str(width): width for width in bits}}
    found = {known[text]: value for text, value in values.items() if text in known}  # 2.0 is 2
    for width in bits:
        if width not in found:
            raise MpqError(f"{where}.{width}: this key is missing")
    return {width: found[width] for width in bits}
