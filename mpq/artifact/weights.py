"""One weight in the packed file: its size, its bytes, and back. docs/artifact-format.md describes the bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.coding import entropy
from mpq.coding.codes import pack_codes, packed_size, unpack_codes
from mpq.errors import MpqError
from mpq.quantization.grids import scale_shape
from mpq.quantization.quantizers import Quantized, dequantize, quantize_widths
from mpq.quantization.spec import FLOAT_BITS, SCHEMES, QuantSpec
from mpq.runtime import one_thread

AT_ONCE = 2**22
"""Weights that the entropy coder takes together: enough to hide its overhead, few enough for the memory."""


@dataclass(frozen=True)
class WeightFormat:
    """The way in which the weights of a model are stored.

    Attributes:
        spec: The quantizer of every layer; its `bits` are replaced by each layer's own.
        rest_dtype: The type of whatever is not quantized: "float16" or "float32"; where weights are entropy-coded
            "coded" or "float32". Empty: the first of these.
    """

    spec: QuantSpec
    rest_dtype: str = ""

    def __post_init__(self) -> None:
        known = ("coded", "float32") if self.spec.record.is_entropy_coded else ("float16", "float32")
        if self.rest_dtype not in ("", *known):
            raise MpqError(
                f"rest_dtype: expected {' or '.join(known)} for the scheme {self.spec.scheme}, got {self.rest_dtype!r}"
            )
        object.__setattr__(self, "rest_dtype", self.rest_dtype or known[0])

    @property
    def float_bits(self) -> int:
        """The width of a layer that is left unquantized."""
        return 32 if self.rest_dtype == "float32" else 16

    def to_json(self) -> dict[str, Any]:
        """Returns the "quantizer" object of the sensitivity and allocation files."""
        spec = self.spec
        return {
            "scheme": spec.scheme,
            "granularity": spec.granularity,
            "clip": spec.clip,
            "rounding": spec.rounding,
            "scale_dtype": spec.scale_dtype,
            "rest_dtype": self.rest_dtype,
        }

    @classmethod
    def from_json(cls, quantizer: Mapping[str, Any]) -> "WeightFormat":
        """Returns the format of a "quantizer" object; keys that it lacks have their default.

        Raises:
            MpqError: An unknown key or value.
        """
        known = cls(QuantSpec(8)).to_json()
        if unknown := set(quantizer) - set(known):
            raise MpqError(f"quantizer: unknown key {sorted(unknown)[0]!r}; known: {', '.join(known)}")
        options = known | {"granularity": "", "clip": "", "rest_dtype": ""} | dict(quantizer)
        return cls(rest_dtype=options.pop("rest_dtype"), spec=QuantSpec(bits=8, **options))

    @classmethod
    def from_options(cls, options: Mapping[str, Any], has_data: bool = True) -> "WeightFormat":
        """Returns the format of some options; a "rounding" that they lack is the scheme's default with data or without.

        Raises:
            MpqError: An unknown option or value.
        """
        if "rounding" not in options and (scheme := SCHEMES.get(options.get("scheme", QuantSpec.scheme))):
            default = scheme.rounding_with_data if has_data else scheme.roundings[0]
            return cls.from_json({**options, "rounding": default})
        return cls.from_json(options)


def layer_bytes(shape: tuple[int, ...], bits: float, weight_format: WeightFormat) -> int:
    """Returns the bytes of a layer in the file: codes, zero points or centroids, scales; or floats at 16 or 32 bits.

    The bytes of entropy-coded layers depend on the codes: `encode_all` returns them.
    """
    numel = int(np.prod(shape))
    if bits in FLOAT_BITS:
        return int(numel * bits) // 8
    spec = replace(weight_format.spec, bits=bits)
    groups = int(np.prod(scale_shape(shape, spec)))
    zero_points = packed_size(groups, len(spec.codes)) if spec.record.has_zero_points else 0
    centroids = len(spec.codes) if spec.record.has_centroids else 0
    scales = groups * np.dtype(spec.scale_dtype).itemsize
    return packed_size(numel, len(spec.codes)) + zero_points + centroids + scales


def quantize_layer(
    name: str, weight: Tensor, weight_format: WeightFormat, widths: Sequence[float], grams: Mapping[str, Tensor]
) -> list[Tensor]:
    """Returns the weight that the file gives back when it is stored at each of several widths.

    Args:
        name: The weight's name.
        weight: The weight, of any shape.
        weight_format: The quantizer, and how weights are stored.
        widths: Bit-widths from 1 to 8.
        grams: {weight name: statistics} (`mpq.sensitivity.statistics.input_grams`); not looked at where the rounding
            needs none.

    Raises:
        MpqError: The weight cannot be quantized; the message names it.
    """
    stored = quantize_weight(name, weight, weight_format, widths, grams)
    return [dequantize(one, replace(weight_format.spec, bits=bits)) for bits, one in zip(widths, stored, strict=True)]


def quantize_weight(
    name: str, weight: Tensor, weight_format: WeightFormat, widths: Sequence[float], grams: Mapping[str, Tensor]
) -> list[Quantized]:
    """Returns a weight's codes, scales and zero points at each of several widths.

    The arguments are those of `quantize_layer`. A weight that the data of the statistics never reach is rounded to
    nearest (`unreached`).

    Raises:
        MpqError: The weight cannot be quantized; the message names it.
    """
    spec = weight_format.spec
    if spec.needs_statistics and not grams:
        raise MpqError(
            f"{name}: no calibration data reached it, so there are no statistics to round it by; use --rounding nearest"
        )
    if unreached([name], weight_format, grams):
        spec = replace(spec, rounding="nearest")
    try:
        with one_thread():  # so that codes, and with them the file, are the same for any number
            return quantize_widths(weight, spec, widths, grams.get(name))
    except MpqError as error:
        raise MpqError(f"{name}: {error}") from None


def unreached(names: Iterable[str], weight_format: WeightFormat, grams: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the weights that are rounded to nearest because no data reach them: their inputs are all zero.

    Args:
        names: The weights that are to be rounded.
        weight_format, grams: As in `quantize_layer`.
    """
    if not weight_format.spec.needs_statistics:
        return ()
    return tuple(name for name in names if name not in grams or not bool(grams[name].any()))


def encode_floats(name: str, weight: Tensor, bits: float) -> bytes:
    """Returns the floats of a weight that is left unquantized."""
    try:
        return float_bytes(weight, f"float{bits:g}")
    except MpqError as error:
        raise MpqError(f"{name}: {error}") from None


def encode(quantized: Quantized, bits: float, weight_format: WeightFormat) -> bytes:
    """Returns codes, zero points or centroids, and scales of a weight."""
    (encoded,) = encode_all([quantized], bits, weight_format)
    return encoded


def encode_all(stored: Sequence[Quantized], bits: float, weight_format: WeightFormat) -> list[bytes]:
    """Returns the bytes of each of several weights; the entropy coder takes far less time for all at once.

    Args:
        stored: The weights.
        bits: Their width; where they are entropy-coded it does not matter, so that they may have different ones.
        weight_format: The format of all.
    """
    spec = weight_format.spec
    if not spec.record.is_entropy_coded:
        return [_encode_fixed(one, replace(spec, bits=bits)) for one in stored]
    payloads = entropy.encode([_coded(one) for one in stored])
    parts = [float_bytes(one.scale, spec.scale_dtype) + payload for one, payload in zip(stored, payloads, strict=True)]
    return [varint(len(part)) + part for part in parts]


def _encode_fixed(quantized: Quantized, spec: QuantSpec) -> bytes:
    codes = spec.codes
    indices = (quantized.codes.flatten().to(torch.int16).cpu() - codes.start) // codes.step
    encoded = pack_codes(indices.numpy(), len(codes))
    if quantized.zero_point is not None:
        encoded += pack_codes(quantized.zero_point.flatten().cpu().numpy(), len(codes))
    if quantized.centroids is not None:
        encoded += quantized.centroids.cpu().numpy().tobytes()
    return encoded + float_bytes(quantized.scale, spec.scale_dtype)


def _coded(quantized: Quantized) -> entropy.Coded:
    """Returns the integers of a weight whose codes are entropy-coded."""
    codes = quantized.codes.cpu()
    matrix = codes.flatten(1).numpy() if codes.ndim > 1 else codes.reshape(1, -1).numpy()
    if quantized.exponents is None:
        return entropy.Coded(matrix, *(np.zeros(count, dtype=np.int8) for count in matrix.shape))
    rows, columns = (one.cpu().numpy() for one in quantized.exponents)
    return entropy.Coded(matrix, rows, columns)


def take_layer(cursor: "Cursor", shape: tuple[int, ...], bits: float, weight_format: WeightFormat) -> bytes:
    """Returns the bytes of the next layer of the file, without the length before them where there is one.

    Raises:
        MpqError: The file ends before.
    """
    if weight_format.spec.record.is_entropy_coded and bits not in FLOAT_BITS:
        return cursor.take(cursor.varint())
    return cursor.take(layer_bytes(shape, bits, weight_format))


def decode(data: bytes, shape: tuple[int, ...], bits: float, weight_format: WeightFormat) -> Tensor:
    """Returns the float32 weight that `encode` stored, from the bytes that `take_layer` returns."""
    if bits in FLOAT_BITS:
        return read_floats(data, shape, f"float{bits:g}")
    spec = replace(weight_format.spec, bits=bits)
    if spec.record.is_entropy_coded:
        (weight,) = decode_coded([data], [shape], spec)
        return weight
    cursor = Cursor(data)
    numel, scales = int(np.prod(shape)), scale_shape(shape, spec)
    groups = int(np.prod(scales))
    count = len(spec.codes)
    indices = torch.from_numpy(unpack_codes(cursor.take(packed_size(numel, count)), numel, count))
    codes = indices.to(torch.int16) * spec.codes.step + spec.codes.start
    zero_point, centroids = None, None
    if spec.record.has_zero_points:
        zero_points = unpack_codes(cursor.take(packed_size(groups, count)), groups, count)
        zero_point = torch.from_numpy(zero_points).reshape(scales)
    if spec.record.has_centroids:
        centroids = torch.from_numpy(np.frombuffer(cursor.take(count), dtype=np.int8).copy())
    scale = read_floats(cursor.take(groups * np.dtype(spec.scale_dtype).itemsize), scales, spec.scale_dtype)
    return dequantize(Quantized(codes.reshape(shape), scale, zero_point, centroids), spec)


def layer_length(data: bytes, bits: float, weight_format: WeightFormat) -> int:
    """Returns the bytes in the file of a layer that `take_layer` returned."""
    has_length = weight_format.spec.record.is_entropy_coded and bits not in FLOAT_BITS
    return len(data) + (len(varint(len(data))) if has_length else 0)


def decode_layers(
    stored: Mapping[str, bytes],
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, float],
    weight_format: WeightFormat,
) -> dict[str, Tensor]:
    """Returns {name: float32 weight} of layers that `take_layer` returned; several at once where that is faster.

    Raises:
        MpqError: A layer is shorter than its shape says, or damaged.
    """
    found = {}
    last = list(stored)[-1] if stored else None
    waiting: list[str] = []
    for name, data in stored.items():
        if weight_format.spec.record.is_entropy_coded and widths[name] not in FLOAT_BITS:
            waiting.append(name)
        else:
            found[name] = decode(data, shapes[name], widths[name], weight_format)
        if waiting and (name == last or sum(int(np.prod(shapes[one])) for one in waiting) >= AT_ONCE):
            weights = decode_coded(
                [stored[one] for one in waiting], [shapes[one] for one in waiting], weight_format.spec
            )
            found.update(zip(waiting, weights, strict=True))
            waiting.clear()
    return found


def decode_coded(data: Sequence[bytes], shapes: Sequence[tuple[int, ...]], spec: QuantSpec) -> list[Tensor]:
    """Returns several float32 weights that are entropy-coded, from the bytes that `take_layer` returns for each.

    Raises:
        MpqError: A weight is shorter than its shape says, or damaged.
    """
    width = np.dtype(spec.scale_dtype).itemsize
    matrices = [(shape[0] if len(shape) > 1 else 1, int(np.prod(shape[len(shape) > 1 :]))) for shape in shapes]
    found = []
    for one, coded, shape in zip(data, entropy.decode([one[width:] for one in data], matrices), shapes, strict=True):
        codes, *exponents = map(torch.from_numpy, (coded.codes, coded.row_exponents, coded.column_exponents))
        scale = read_floats(one[:width], (1, 1), spec.scale_dtype)
        has_steps = any(bool(some.any()) for some in exponents)
        stored = Quantized(codes.reshape(shape), scale, None, None, (exponents[0], exponents[1]) if has_steps else None)
        found.append(dequantize(stored, spec))
    return found


def float_bytes(tensor: Tensor, dtype: str) -> bytes:
    """Returns a tensor as little-endian floats; raises MpqError if a value does not fit."""
    stored = tensor.detach().cpu().to(getattr(torch, dtype))
    if not stored.isfinite().all():
        raise MpqError(f"a value of {float(tensor.abs().max()):g} does not fit into {dtype}; use --rest-dtype float32")
    return stored.numpy().astype(f"<f{stored.element_size()}").tobytes()


def read_floats(data: bytes, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns the float32 tensor that `float_bytes` wrote."""
    values = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(np.float32)
    return torch.from_numpy(values).reshape(shape)


def varint(number: int) -> bytes:
    """Returns a whole number in groups of 7 bits, the lowest first; all bytes but the last have the highest bit set.

    >>> varint(300).hex()
    'ac02'
    """
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


class Cursor:
    """Reads bytes from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        self.position += size
        if self.position > len(self.data):
            raise MpqError("a part is shorter than the manifest says")
        return self.data[self.position - size : self.position]

    def varint(self) -> int:
        """Returns the whole number that `varint` wrote here."""
        number = 0
        for shift in range(0, 63, 7):
            (group,) = self.take(1)
            number |= (group & 0x7F) << shift
            if group < 0x80:
                return number
        raise MpqError("a length that is no number")
