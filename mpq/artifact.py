"""The packed file: one safetensors file that holds all that is needed to run the model, and is as small as promised.

docs/artifact-format.md describes the bytes. In short: the quantized weights are one stream of packed codes, zero
points and scales; the rest (biases, norms) is in half or single precision; the configuration is compressed. The
header is padded so that the size depends on nothing but the bit-widths, which is why `allocate` can predict it to the
byte. The file is a function of its content alone: no time, no random order (the safetensors library writes its
metadata in random order, hence the own writer; it reads the file).
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpq import __version__
from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.models.base import AsrModel, WeightRef, is_counter, load_state
from mpq.models.hybrid import HybridConformer
from mpq.models.nemo import NemoConformerCtc
from mpq.packing import pack_codes, packed_size, unpack_codes
from mpq.quantizers import Quantized, QuantSpec, code_range, dequantize, quantize_widths, scale_shape
from mpq.records import FLOAT_BITS

FORMAT_NAME, FORMAT_VERSION = "mpq.artifact/", 1
FAMILIES = {"nemo": NemoConformerCtc, "mpq": HybridConformer}
HEADER_SLACK = 128
"""Bytes to spare in the header, so that what another version of the compressor makes, which may differ by a few bytes,
still fits into the size that this one gave."""

_TENSORS = ("rest", "exact", "manifest", "tokenizer", "bits", "weights")


@dataclass(frozen=True)
class Storage:
    """How a whole model is stored.

    Attributes:
        spec: The quantizer of every layer; its `bits` are replaced by each layer's own.
        rest_dtype: "float16" or "float32": of whatever is not quantized.
    """

    spec: QuantSpec
    rest_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.rest_dtype not in ("float16", "float32"):
            raise MpqError(f"rest_dtype: expected float16 or float32, got {self.rest_dtype!r}")

    @property
    def float_bits(self) -> int:
        """Width of a layer that is left unquantized."""
        return 16 if self.rest_dtype == "float16" else 32

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
    def from_json(cls, quantizer: Mapping[str, Any]) -> "Storage":
        """Returns what a "quantizer" object says; keys that it lacks have their default.

        Raises:
            MpqError: An unknown key or value.
        """
        known = cls(QuantSpec(8)).to_json()
        if unknown := set(quantizer) - set(known):
            raise MpqError(f"quantizer: unknown key {sorted(unknown)[0]!r}; known: {', '.join(known)}")
        options = known | dict(quantizer)
        return cls(rest_dtype=options.pop("rest_dtype"), spec=QuantSpec(bits=8, **options))

    @classmethod
    def from_options(cls, options: Mapping[str, Any], has_data: bool = True) -> "Storage":
        """Returns what options say; without a "rounding" it is gptq where there are data and the scheme has it.

        Raises:
            MpqError: As `from_json`.
        """
        is_gptq = has_data and options.get("scheme") != "mulaw"
        return cls.from_json({"rounding": "gptq" if is_gptq else "nearest"} | dict(options))


def layer_bytes(shape: tuple[int, ...], bits: int, storage: Storage) -> int:
    """Returns what a layer takes in the file: codes, zero points or centroids, scales; its floats at 16 or 32 bits."""
    numel = int(np.prod(shape))
    if bits in FLOAT_BITS:
        return numel * bits // 8
    spec = replace(storage.spec, bits=bits)
    groups = int(np.prod(scale_shape(shape, spec)))
    zero_points = packed_size(groups, 2**bits) if spec.scheme == "asymmetric" else 0
    centroids = 2**bits if spec.scheme == "mulaw" else 0
    scales = groups * np.dtype(spec.scale_dtype).itemsize
    return packed_size(numel, _levels(spec)) + zero_points + centroids + scales


def fixed_bytes(model: AsrModel, storage: Storage) -> int:
    """Returns the size of the packed file less its layers: header, configuration, tokenizer, biases and norms."""
    sizes = {name: len(part) for name, part in _parts(model, storage).items()}
    largest = sum(layer_bytes(ref.shape, 32, storage) for ref in model.weights())
    header = len(_header(sizes | {"weights": largest}, storage, checksum="0" * 64))
    header = -(-(header + HEADER_SLACK) // 8) * 8  # so that the first tensor is aligned
    return 8 + header + sum(sizes.values())


def write_artifact(
    path: Path,
    model: AsrModel,
    bits: Mapping[str, int],
    storage: Storage,
    size_bytes: int,
    grams: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[float], None] = lambda amount: None,
) -> None:
    """Quantizes and packs a model; the file appears under its name when it is whole.

    Args:
        path: The file to write or replace.
        model: A float model.
        bits: {weight name: 1 to 8, or 16 or 32 for a layer left unquantized}, for every weight of the model.
        storage: How to store it.
        size_bytes: The size that the file gets: `fixed_bytes` plus the layers, give or take HEADER_SLACK.
        grams: For the rounding "gptq": {weight name: statistics} (`mpq.calibration.input_grams`).
        on_layer: Told 1 with each finished layer.

    Raises:
        MpqError: `bits` has missing or unknown names, a weight cannot be quantized, the content does not fit into
            `size_bytes`, or the file cannot be written.
    """
    refs = model.weights()
    check_names(refs, bits)
    parts = _parts(model, storage)
    state = model.state_dict()
    parts["bits"] = bytes(bits[ref.name] for ref in refs)
    payloads = []
    for ref in refs:
        payloads.append(_encode(ref.name, state[ref.name], bits[ref.name], storage, grams or {}))
        on_layer(1)
        assert len(payloads[-1]) == layer_bytes(ref.shape, bits[ref.name], storage)
    parts["weights"] = b"".join(payloads)
    data = _file(parts, storage, size_bytes)
    if len(data) != size_bytes:
        raise MpqError(f"{path}: the content takes {len(data)} bytes and does not fit into the {size_bytes} planned")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_artifact(path: Path) -> AsrModel:
    """Returns the model in a packed file: its weights are the fake-quantized ones, bit for bit.

    Raises:
        MpqError: Not such a file, cut off, changed after it was written, or of a newer version.
    """
    parts = _read_parts(path)
    try:
        return _model(parts)
    except (KeyError, ValueError, TypeError, lzma.LZMAError, RuntimeError, MpqError) as error:
        raise MpqError(f"{path}: the parts of the file contradict each other: {error}") from None


def _model(parts: Mapping[str, bytes]) -> AsrModel:
    manifest = json.loads(lzma.decompress(parts["manifest"]))
    storage = Storage.from_json(manifest["quantizer"])
    model = FAMILIES[manifest["model"]["family"]].from_config(manifest["model"], parts["tokenizer"])
    refs = {ref.name: ref for ref in model.weights()}
    state: dict[str, Tensor] = {}
    cursor = _Cursor(parts["weights"])
    for name, width in zip(manifest["weights"], parts["bits"], strict=True):
        shape = refs[name].shape
        state[name] = _decode(cursor.take(layer_bytes(shape, width, storage)), shape, width, storage)
    own = model.state_dict()
    for blob, dtype in (("rest", manifest["quantizer"]["rest_dtype"]), ("exact", "float32")):
        cursor = _Cursor(parts[blob] if blob == "rest" else lzma.decompress(parts[blob]))
        for name in manifest[blob]:
            size = own[name].numel() * np.dtype(dtype).itemsize
            state[name] = _floats(cursor.take(size), tuple(own[name].shape), dtype)
    load_state(model, state)
    model.quantized_bits = dict(zip(manifest["weights"], parts["bits"], strict=True))
    model.quantized_bytes = {
        name: layer_bytes(refs[name].shape, bits, storage) for name, bits in model.quantized_bits.items()
    }
    return model


def is_artifact(path: Path) -> bool:
    """Returns whether a file looks like safetensors: a header length and an opening brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def check_names(refs: Sequence[WeightRef], bits: Mapping[str, int]) -> None:
    """Raises MpqError unless `bits` names each weight and nothing else."""
    names = [ref.name for ref in refs]
    for what, some in (
        ("has no bit-width for", [name for name in names if name not in bits]),
        ("names layers that the model lacks:", [name for name in bits if name not in set(names)]),
    ):
        if some:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            raise MpqError(f"the allocation {what} {some[0]}{more}; it was made for another model")


def quantize_layer(
    name: str, weight: Tensor, storage: Storage, widths: Sequence[int], grams: Mapping[str, Tensor]
) -> list[Tensor]:
    """Returns what the file gives back of a weight stored at each of several widths.

    Args:
        name: Of the weight.
        weight: Of any shape.
        storage: How it is stored.
        widths: 1 to 8.
        grams: {weight name: statistics} (`mpq.calibration.input_grams`); not looked at when rounding is "nearest".

    Raises:
        MpqError: The weight cannot be quantized; the message names it.
    """
    quantized = _quantized(name, weight, storage, widths, grams)
    return [dequantize(one, storage.spec) for one in quantized]


def _quantized(
    name: str, weight: Tensor, storage: Storage, widths: Sequence[int], grams: Mapping[str, Tensor]
) -> list[Quantized]:
    if storage.spec.rounding == "gptq" and name not in grams:
        raise MpqError(
            f"{name}: no calibration data reached it, so there are no statistics to round it by; use --rounding nearest"
        )
    try:
        return quantize_widths(weight, storage.spec, widths, grams.get(name))
    except MpqError as error:
        raise MpqError(f"{name}: {error}") from None


def _levels(spec: QuantSpec) -> int:
    """Returns how many codes the spec uses, for `packing`."""
    q_min, q_max = code_range(spec)
    return 2 if spec.bits == 1 else q_max - q_min + 1


def _encode(name: str, weight: Tensor, bits: int, storage: Storage, grams: Mapping[str, Tensor]) -> bytes:
    """Returns codes, zero points or centroids, and scales of a weight, or its floats."""
    if bits in FLOAT_BITS:
        try:
            return _float_bytes(weight, f"float{bits}")
        except MpqError as error:
            raise MpqError(f"{name}: {error}") from None
    spec = replace(storage.spec, bits=bits)
    (quantized,) = _quantized(name, weight, storage, [bits], grams)
    codes = quantized.codes.flatten().to(torch.int16).cpu()
    codes = (codes + 1) // 2 if spec.bits == 1 and spec.scheme == "symmetric" else codes - code_range(spec)[0]
    encoded = pack_codes(codes.numpy(), _levels(spec))
    if quantized.zero_point is not None:
        encoded += pack_codes(quantized.zero_point.flatten().cpu().numpy(), 2**bits)
    if quantized.centroids is not None:
        encoded += quantized.centroids.cpu().numpy().tobytes()
    return encoded + _float_bytes(quantized.scale, spec.scale_dtype)


def _decode(data: bytes, shape: tuple[int, ...], bits: int, storage: Storage) -> Tensor:
    """Returns the float32 weight that `_encode` stored."""
    if bits in FLOAT_BITS:
        return _floats(data, shape, f"float{bits}")
    spec = replace(storage.spec, bits=bits)
    cursor = _Cursor(data)
    numel, scales = int(np.prod(shape)), scale_shape(shape, spec)
    groups = int(np.prod(scales))
    stored = unpack_codes(cursor.take(packed_size(numel, _levels(spec))), numel, _levels(spec))
    codes, zero_point, centroids = torch.from_numpy(stored).to(torch.int16), None, None
    if spec.scheme == "mulaw":
        centroids = torch.from_numpy(np.frombuffer(cursor.take(2**bits), dtype=np.int8).copy())
    elif spec.scheme == "asymmetric":
        zero_points = unpack_codes(cursor.take(packed_size(groups, 2**bits)), groups, 2**bits)
        zero_point = torch.from_numpy(zero_points).reshape(scales)
    else:
        codes = codes * 2 - 1 if bits == 1 else codes + code_range(spec)[0]
    scale = _floats(cursor.take(groups * np.dtype(spec.scale_dtype).itemsize), scales, spec.scale_dtype)
    return dequantize(Quantized(codes.reshape(shape), scale, zero_point, centroids), spec)


def _parts(model: AsrModel, storage: Storage) -> dict[str, bytes]:
    """Returns all parts of the file but `weights`; `bits` is a placeholder of the right length."""
    names = [ref.name for ref in model.weights()]
    parameters = dict(model.named_parameters())
    rest: dict[str, bytes] = {}
    exact: dict[str, bytes] = {}
    for name, tensor in model.state_dict().items():
        if name in names or is_counter(name):
            continue
        is_trained = name in parameters or name.endswith(("running_mean", "running_var"))
        if is_trained and (storage.rest_dtype == "float32" or _survives_half(name, tensor)):
            rest[name] = _float_bytes(tensor, storage.rest_dtype)
        else:
            exact[name] = _float_bytes(tensor, "float32")
    config, tokenizer = model.to_config()
    manifest = {
        "model": config,
        "quantizer": storage.to_json(),
        "weights": names,
        "rest": list(rest),
        "exact": list(exact),
    }
    return {
        "rest": b"".join(rest.values()),
        "exact": lzma.compress(b"".join(exact.values()), preset=9),
        "manifest": lzma.compress(json.dumps(manifest, ensure_ascii=False, sort_keys=True).encode(), preset=9),
        "tokenizer": tokenizer,
        "bits": b"\0" * len(names),
    }


def _survives_half(name: str, tensor: Tensor) -> bool:
    """Returns whether half precision keeps a tensor to 2^-10 of its largest value (a variance: of each value)."""
    error = (tensor.half().float() - tensor).abs()
    reference = tensor.abs() if name.endswith("running_var") else tensor.abs().amax()
    return bool((error <= 2**-10 * reference).all())  # false for infinity and NaN too


def _file(parts: Mapping[str, bytes], storage: Storage, size_bytes: int) -> bytes:
    """Returns the safetensors file: length of the header, header, data; padded with spaces in the header."""
    header = _header({name: len(part) for name, part in parts.items()}, storage, _checksum(parts))
    padding = size_bytes - 8 - len(header) - sum(len(part) for part in parts.values())
    header += b" " * max(padding, 0)
    return len(header).to_bytes(8, "little") + header + b"".join(parts[name] for name in _TENSORS)


def _header(sizes: Mapping[str, int], storage: Storage, checksum: str) -> bytes:
    """Returns the header of a file whose parts have these sizes in bytes, without padding."""
    metadata = {"format": f"{FORMAT_NAME}{FORMAT_VERSION}", "mpq": __version__, "sha256": checksum}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in _TENSORS:
        dtype, width = (f"F{storage.float_bits}", storage.float_bits // 8) if name == "rest" else ("U8", 1)
        end = start + sizes[name]
        entries[name] = {"dtype": dtype, "shape": [sizes[name] // width], "data_offsets": [start, end]}
        start = end
    return json.dumps(entries, separators=(",", ":")).encode()


def _checksum(parts: Mapping[str, bytes]) -> str:
    """Returns the SHA-256 of all parts, each with its name and length."""
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(f"{name}:{len(parts[name])}:".encode())
        digest.update(parts[name])
    return digest.hexdigest()


def _read_parts(path: Path) -> dict[str, bytes]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata.get("format"))
            names = set(file.keys())
            if names != set(_TENSORS):
                raise MpqError(f"{path}: expected the tensors {', '.join(_TENSORS)}, got {', '.join(sorted(names))}")
            parts = {name: file.get_tensor(name).tobytes() for name in _TENSORS}
    except FileNotFoundError:
        raise MpqError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise MpqError(f"{path}: not a whole safetensors file (cut off or damaged): {error}") from None
    if _checksum(parts) != metadata.get("sha256"):
        raise MpqError(f"{path}: the content does not match its checksum: changed or damaged after it was written")
    return parts


def _check_format(path: Path, format: str | None) -> None:
    if format == f"{FORMAT_NAME}{FORMAT_VERSION}":
        return
    version = (format or "").removeprefix(FORMAT_NAME)
    if format and format.startswith(FORMAT_NAME) and version.isdigit() and int(version) > FORMAT_VERSION:
        raise MpqError(
            f"{path}: format {format} is newer than this mpq {__version__} reads "
            f"({FORMAT_NAME}{FORMAT_VERSION}); update mpq"
        )
    raise MpqError(f"{path}: expected format {FORMAT_NAME}{FORMAT_VERSION}, got {format!r}: not written by `mpq pack`")


def _float_bytes(tensor: Tensor, dtype: str) -> bytes:
    stored = tensor.detach().cpu().to(getattr(torch, dtype))
    if not stored.isfinite().all():
        raise MpqError(f"a value of {float(tensor.abs().max()):g} does not fit into {dtype}; use --rest-dtype float32")
    return stored.numpy().astype(f"<f{stored.element_size()}").tobytes()


def _floats(data: bytes, shape: tuple[int, ...], dtype: str) -> Tensor:
    values = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(np.float32)
    return torch.from_numpy(values).reshape(shape)


class _Cursor:
    """Reads a blob from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        self.position += size
        if self.position > len(self.data):
            raise MpqError("a part is shorter than the manifest says")
        return self.data[self.position - size : self.position]
