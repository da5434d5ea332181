"""The packed file: one safetensors file that holds all that is needed to run the model, and is as small as promised.

docs/artifact-format.md describes the bytes. In short: the quantized weights are one stream of packed codes, zero
points and scales; the rest (biases, norms) is in half or single precision; the configuration is compressed. The
header is padded so that the size depends on nothing but the bit-widths, which is why `allocate` can predict it to the
byte. The file is a function of its content alone: no time, no random order (the safetensors library writes its
metadata in random order, so it reads the file here but does not write it).
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpq import __version__
from mpq.artifact.weights import (
    AT_ONCE,
    Cursor,
    WeightFormat,
    decode_layers,
    encode,
    encode_all,
    encode_floats,
    float_bytes,
    layer_bytes,
    layer_length,
    quantize_weight,
    read_floats,
    take_layer,
)
from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.models.base import AsrModel, WeightRef, is_counter, load_state
from mpq.models.families import family_class
from mpq.quantization.quantizers import Quantized
from mpq.quantization.spec import FLOAT_BITS, as_width

FORMAT_NAME = "mpq.artifact/"
FORMAT_VERSIONS = (1, 2)
"""Version 2 has entropy-coded weights (`_version`)."""
HEADER_SLACK = 128
"""Bytes to spare in the header: the output of another version of the compressor may differ by a few bytes, and has to
fit into the size that this one gave."""
LAYER_SLACK = 2
"""Bytes to spare for each entropy-coded layer: on another machine, statistics differ in their last digits, so that a
few codes and their bytes may differ."""
MILLIBITS = 1000
"""Widths are stored in thousandths of a bit where they are rates."""

_LARGEST_MANIFEST = 1 << 26
"""Bytes of names and options: a hundred for each of 600,000 tensors."""
_XZ_MEMORY = 1 << 28
"""The dictionary of xz's highest preset takes 65 MB."""

_NO_CHECKSUM = "0" * 64
_TENSORS = ("rest", "exact", "manifest", "tokenizer", "bits", "weights")


def fixed_bytes(model: AsrModel, weight_format: WeightFormat) -> int:
    """Returns the size of the packed file less its layers: header, configuration, tokenizer, biases and norms."""
    sizes = {name: len(part) for name, part in _parts(model, weight_format).items()}
    largest = sum(layer_bytes(ref.shape, 32, weight_format) for ref in model.weights())
    header = len(_header(sizes | {"weights": largest}, weight_format, checksum="0" * 64))
    header = -(-(header + size_slack(model, weight_format)) // 8) * 8  # so that the first tensor is aligned
    return 8 + header + sum(sizes.values())


def size_slack(model: AsrModel, weight_format: WeightFormat) -> int:
    """Returns the bytes to spare in a file: what is written elsewhere, or later, may be larger by so many."""
    return HEADER_SLACK + (LAYER_SLACK * len(model.weights()) if weight_format.spec.record.is_entropy_coded else 0)


def write_artifact(
    path: Path,
    model: AsrModel,
    bits: Mapping[str, float],
    weight_format: WeightFormat,
    size_bytes: int | None,
    grams: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[float], None] = lambda amount: None,
    quantized: Mapping[str, Quantized] | None = None,
    like: AsrModel | None = None,
) -> int:
    """Quantizes and packs a model; the file appears under its name when it is whole.

    Args:
        path: The file to write or replace.
        model: A float model.
        bits: {weight name: 1 to 8, or 16 or 32 for a layer left unquantized}, for every weight of the model.
        weight_format: The quantizer, and how weights are stored.
        size_bytes: The size that the file gets: `fixed_bytes` plus the layers, give or take `size_slack`. It is the
            most where layers are entropy-coded: a file that is smaller by more than twice the slack is not filled up.
            None: what the content takes.
        grams: For the rounding "gptq": {weight name: statistics} (`mpq.sensitivity.statistics.input_grams`).
        on_layer: Called with 1 for each finished layer.
        quantized: {weight name: codes} of weights that are quantized already; they are stored as they are.
        like: The model that the size was planned for, if the values have changed since: a tensor is stored in half
            precision where that model's file would have it so.

    Returns:
        The size of the file.

    Raises:
        MpqError: `bits` has missing or unknown names, a weight cannot be quantized, the content does not fit into
            `size_bytes`, or the file cannot be written.
    """
    refs = model.weights()
    check_names(refs, bits)
    parts = _parts(model, weight_format, like)
    parts["bits"] = _stored_widths([bits[ref.name] for ref in refs], weight_format)
    parts["weights"] = b"".join(_layers(model, bits, weight_format, grams or {}, quantized or {}, on_layer))
    natural = fixed_bytes(like or model, weight_format) + len(parts["weights"])
    slack = size_slack(model, weight_format)
    is_coded = weight_format.spec.record.is_entropy_coded
    if size_bytes is None or (is_coded and natural < size_bytes - 2 * slack):
        size_bytes = natural
    data = _file(parts, weight_format, size_bytes)
    if len(data) != size_bytes:
        remedy = "; allocate for a target that is a little smaller" if is_coded else ""
        raise MpqError(
            f"{path}: the content takes {len(data)} bytes and does not fit into the {size_bytes} planned{remedy}"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return size_bytes


def _layers(
    model: AsrModel,
    bits: Mapping[str, float],
    weight_format: WeightFormat,
    grams: Mapping[str, Tensor],
    quantized: Mapping[str, Quantized],
    on_layer: Callable[[float], None],
) -> list[bytes]:
    """Returns the bytes of all weights, in the model's order; the arguments are those of `write_artifact`."""
    state, is_coded = model.state_dict(), weight_format.spec.record.is_entropy_coded
    found: dict[str, bytes] = {}
    waiting: dict[str, Quantized] = {}  # the entropy coder takes less time for several at once

    def encode_waiting() -> None:
        found.update(zip(waiting, encode_all(list(waiting.values()), 0, weight_format), strict=True))
        waiting.clear()

    for ref in model.weights():
        width, weight = bits[ref.name], state[ref.name]
        if width in FLOAT_BITS:
            found[ref.name] = encode_floats(ref.name, weight, width)
        else:
            one = quantized.get(ref.name)
            if one is None:
                (one,) = quantize_weight(ref.name, weight, weight_format, [width], grams)
            if is_coded:
                waiting[ref.name] = one
            else:
                found[ref.name] = encode(one, width, weight_format)
                assert len(found[ref.name]) == layer_bytes(ref.shape, width, weight_format)
        if sum(one.codes.numel() for one in waiting.values()) >= AT_ONCE:
            encode_waiting()
        on_layer(1)
    if waiting:
        encode_waiting()
    return [found[ref.name] for ref in model.weights()]


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
    manifest = json.loads(_decompressed(parts["manifest"], _LARGEST_MANIFEST))
    weight_format = WeightFormat.from_json(manifest["quantizer"])
    model = family_class(manifest["model"]["family"]).from_config(manifest["model"], parts["tokenizer"])
    refs = {ref.name: ref for ref in model.weights()}
    state: dict[str, Tensor] = {}
    widths = dict(zip(manifest["weights"], _read_widths(parts["bits"], weight_format), strict=True))
    shapes = {name: refs[name].shape for name in widths}
    cursor = Cursor(parts["weights"])
    stored = {name: take_layer(cursor, shapes[name], width, weight_format) for name, width in widths.items()}
    state |= decode_layers(stored, shapes, widths, weight_format)
    own = model.state_dict()
    for blob, dtype in (("rest", manifest["quantizer"]["rest_dtype"]), ("exact", "float32")):
        most = sum(own[name].numel() for name in manifest[blob]) * np.dtype(dtype).itemsize
        cursor = Cursor(parts[blob] if blob == "rest" else _decompressed(parts[blob], most))
        for name in manifest[blob]:
            size = own[name].numel() * np.dtype(dtype).itemsize
            state[name] = read_floats(cursor.take(size), tuple(own[name].shape), dtype)
    load_state(model, state)
    model.quantized_bits = widths
    model.quantized_bytes = {name: layer_length(data, widths[name], weight_format) for name, data in stored.items()}
    return model


def _version(weight_format: WeightFormat) -> int:
    """Returns the version of the format that a file has."""
    return 2 if weight_format.spec.record.is_entropy_coded else 1


def _stored_widths(widths: Sequence[float], weight_format: WeightFormat) -> bytes:
    """Returns the part "bits": a byte for each width, or two bytes in thousandths of a bit where they are rates."""
    if weight_format.spec.record.is_entropy_coded:
        return np.array([round(width * MILLIBITS) for width in widths], dtype="<u2").tobytes()
    return bytes(int(width) for width in widths)


def _read_widths(data: bytes, weight_format: WeightFormat) -> list[float]:
    """Returns the widths that `_stored_widths` wrote."""
    if weight_format.spec.record.is_entropy_coded:
        return [as_width(number / MILLIBITS) for number in np.frombuffer(data, dtype="<u2").tolist()]
    return list(data)


def _decompressed(data: bytes, most: int) -> bytes:
    """Returns what xz has compressed; raises MpqError where that is more than `most` bytes."""
    decompressor = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
    found = decompressor.decompress(data, most + 1)
    if len(found) > most or not decompressor.eof:
        raise MpqError(f"a compressed part that is cut off, or larger than the {most} bytes that it may have")
    return found


def exact_names(model: AsrModel, weight_format: WeightFormat) -> set[str]:
    """Returns the trained tensors that half precision would spoil, so that the file has them compressed in full.

    How many bytes they take depends on their values.
    """
    state, weights = model.state_dict(), {ref.name for ref in model.weights()}
    return {name for name in _trained(model) - weights if not _stays_half(name, state[name], weight_format)}


def is_artifact(path: Path) -> bool:
    """Returns whether a file looks like safetensors: a header length and an opening brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def check_names(refs: Sequence[WeightRef], bits: Mapping[str, float]) -> None:
    """Raises MpqError unless `bits` names each weight and nothing else."""
    names = [ref.name for ref in refs]
    for what, some in (
        ("has no bit-width for", [name for name in names if name not in bits]),
        ("names layers that the model lacks:", [name for name in bits if name not in set(names)]),
    ):
        if some:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            raise MpqError(f"the allocation {what} {some[0]}{more}; it was made for another model")


def _parts(model: AsrModel, weight_format: WeightFormat, like: AsrModel | None = None) -> dict[str, bytes]:
    """Returns all parts of the file but `weights`; `bits` is a placeholder of the right length."""
    decides = (like or model).state_dict()
    names = [ref.name for ref in model.weights()]
    trained = _trained(model)
    rest: dict[str, bytes] = {}
    exact: dict[str, bytes] = {}
    for name, tensor in model.state_dict().items():
        if name in names or is_counter(name):
            continue
        if name in trained and _stays_half(name, decides[name], weight_format):
            rest[name] = float_bytes(tensor, weight_format.rest_dtype)
        else:
            exact[name] = float_bytes(tensor, "float32")
    config, tokenizer = model.to_config()
    manifest = {
        "model": config,
        "quantizer": weight_format.to_json(),
        "weights": names,
        "rest": list(rest),
        "exact": list(exact),
    }
    return {
        "rest": b"".join(rest.values()),
        "exact": lzma.compress(b"".join(exact.values()), preset=9),
        "manifest": lzma.compress(json.dumps(manifest, ensure_ascii=False, sort_keys=True).encode(), preset=9),
        "tokenizer": tokenizer,
        "bits": _stored_widths([0.0] * len(names), weight_format),
    }


def _trained(model: AsrModel) -> set[str]:
    """Returns the names of parameters and running statistics."""
    statistics = {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return statistics | {name for name, _ in model.named_parameters()}


def _stays_half(name: str, tensor: Tensor, weight_format: WeightFormat) -> bool:
    """Returns whether rest_dtype keeps a tensor to 2^-10 of its largest value (a variance: of each value)."""
    if weight_format.rest_dtype == "float32":
        return True
    error = (tensor.half().float() - tensor).abs()
    reference = tensor.abs() if name.endswith("running_var") else tensor.abs().amax()
    return bool((error <= 2**-10 * reference).all())  # false for infinity and NaN too


def _file(parts: Mapping[str, bytes], weight_format: WeightFormat, size_bytes: int) -> bytes:
    """Returns the safetensors file: length of the header, header, data; padded with spaces in the header."""
    is_first = _version(weight_format) == 1
    sizes = {name: len(part) for name, part in parts.items()}
    header = _header(sizes, weight_format, _checksum(parts) if is_first else _NO_CHECKSUM)
    padding = size_bytes - 8 - len(header) - sum(sizes.values())
    header += b" " * max(padding, 0)
    data = len(header).to_bytes(8, "little") + header + b"".join(parts[name] for name in _TENSORS)
    return data if is_first else data.replace(_NO_CHECKSUM.encode(), _checksum_of_all(data).encode(), 1)


def _header(sizes: Mapping[str, int], weight_format: WeightFormat, checksum: str) -> bytes:
    """Returns the header of a file whose parts have these sizes in bytes, without padding."""
    metadata = {"format": f"{FORMAT_NAME}{_version(weight_format)}", "mpq": __version__, "sha256": checksum}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in _TENSORS:
        dtype, width = (f"F{weight_format.float_bits}", weight_format.float_bits // 8) if name == "rest" else ("U8", 1)
        end = start + sizes[name]
        entries[name] = {"dtype": dtype, "shape": [sizes[name] // width], "data_offsets": [start, end]}
        start = end
    return json.dumps(entries, separators=(",", ":")).encode()


def _checksum_of_all(data: bytes) -> str:
    """Returns the SHA-256 of a file of version 2 in which zeros stand for the checksum."""
    return hashlib.sha256(data).hexdigest()


def _checksum(parts: Mapping[str, bytes]) -> str:
    """Returns the SHA-256 of all parts of a file of version 1, each with its name and length."""
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
    checksum = metadata.get("sha256", "")
    if metadata["format"] == f"{FORMAT_NAME}1":
        is_same = _checksum(parts) == checksum
    else:
        is_same = _checksum_of_all(path.read_bytes().replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)) == checksum
    if not is_same:
        raise MpqError(f"{path}: the content does not match its checksum: changed or damaged after it was written")
    return parts


def _check_format(path: Path, format: str | None) -> None:
    known = [f"{FORMAT_NAME}{version}" for version in FORMAT_VERSIONS]
    if format in known:
        return
    version = (format or "").removeprefix(FORMAT_NAME)
    if format and format.startswith(FORMAT_NAME) and version.isdigit() and int(version) > FORMAT_VERSIONS[-1]:
        raise MpqError(f"{path}: format {format} is newer than this mpq {__version__} reads ({known[-1]}); update mpq")
    raise MpqError(f"{path}: expected format {' or '.join(known)}, got {format!r}: not written by `mpq pack`")
