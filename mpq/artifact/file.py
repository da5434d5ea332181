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

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpq import __version__
from mpq.artifact.parts import model_of, parts_of, stored_widths, version_of
from mpq.artifact.weights import (
    AT_ONCE,
    WeightFormat,
    encode,
    encode_all,
    encode_floats,
    layer_bytes,
    quantize_weight,
)
from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.models.base import AsrModel, WeightRef
from mpq.quantization.quantizers import Quantized
from mpq.quantization.spec import FLOAT_BITS

FORMAT_NAME = "mpq.artifact/"
FORMAT_VERSIONS = (1, 2)
"""Version 2 has entropy-coded weights."""
HEADER_SLACK = 128
"""Bytes to spare in the header: the output of another version of the compressor may differ by a few bytes, and has to
fit into the size that this one gave."""
LAYER_SLACK = 2
"""Bytes to spare for each entropy-coded layer: on another machine, statistics differ in their last digits, so that a
few codes and their bytes may differ."""

_NO_CHECKSUM = "0" * 64
_TENSORS = ("rest", "exact", "manifest", "tokenizer", "bits", "weights")


def fixed_bytes(model: AsrModel, weight_format: WeightFormat) -> int:
    """Returns the size of the packed file less its layers: header, configuration, tokenizer, biases and norms."""
    return _fixed_bytes(parts_of(model, weight_format), model, weight_format)


def _fixed_bytes(parts: Mapping[str, bytes], model: AsrModel, weight_format: WeightFormat) -> int:
    """Returns the size of the packed file of these parts less its layers."""
    sizes = {name: len(part) for name, part in parts.items()}
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
    parts = parts_of(model, weight_format, like)
    fixed = _fixed_bytes(parts, model, weight_format)
    parts["bits"] = stored_widths([bits[ref.name] for ref in refs], weight_format)
    parts["weights"] = b"".join(_layers(model, bits, weight_format, grams or {}, quantized or {}, on_layer))
    natural = fixed + len(parts["weights"])
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
    parts, version = _read_parts(path)
    try:
        return model_of(parts, version)
    except (KeyError, ValueError, TypeError, lzma.LZMAError, RuntimeError, MpqError) as error:
        raise MpqError(f"{path}: the parts of the file contradict each other: {error}") from None


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


def _file(parts: Mapping[str, bytes], weight_format: WeightFormat, size_bytes: int) -> bytes:
    """Returns the safetensors file: length of the header, header, data; padded with spaces in the header."""
    is_first = version_of(weight_format) == 1
    sizes = {name: len(part) for name, part in parts.items()}
    header = _header(sizes, weight_format, _checksum(parts) if is_first else _NO_CHECKSUM)
    padding = size_bytes - 8 - len(header) - sum(sizes.values())
    header += b" " * max(padding, 0)
    data = len(header).to_bytes(8, "little") + header + b"".join(parts[name] for name in _TENSORS)
    return data if is_first else data.replace(_NO_CHECKSUM.encode(), _checksum_of_all(data).encode(), 1)


def _header(sizes: Mapping[str, int], weight_format: WeightFormat, checksum: str) -> bytes:
    """Returns the header of a file whose parts have these sizes in bytes, without padding."""
    metadata = {"format": f"{FORMAT_NAME}{version_of(weight_format)}", "mpq": __version__, "sha256": checksum}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in _TENSORS:
        is_floats = name == "rest" and version_of(weight_format) == 1
        dtype, width = (f"F{weight_format.float_bits}", weight_format.float_bits // 8) if is_floats else ("U8", 1)
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


def _read_parts(path: Path) -> tuple[dict[str, bytes], int]:
    """Returns the parts of a file, and the version of its format."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            version = _checked_version(path, metadata.get("format"))
            names = set(file.keys())
            if names != set(_TENSORS):
                raise MpqError(f"{path}: expected the tensors {', '.join(_TENSORS)}, got {', '.join(sorted(names))}")
            parts = {name: file.get_tensor(name).tobytes() for name in _TENSORS}
    except FileNotFoundError:
        raise MpqError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise MpqError(f"{path}: not a whole safetensors file (cut off or damaged): {error}") from None
    checksum = metadata.get("sha256", "")
    if version == 1:
        is_same = _checksum(parts) == checksum
    else:
        is_same = _checksum_of_all(path.read_bytes().replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)) == checksum
    if not is_same:
        raise MpqError(f"{path}: the content does not match its checksum: changed or damaged after it was written")
    return parts, version


def _checked_version(path: Path, format: str | None) -> int:
    """Returns the version that a format names, if it is one that can be read."""
    known = [f"{FORMAT_NAME}{version}" for version in FORMAT_VERSIONS]
    if format in known:
        return FORMAT_VERSIONS[known.index(format)]
    version = (format or "").removeprefix(FORMAT_NAME)
    if format and format.startswith(FORMAT_NAME) and version.isdigit() and int(version) > FORMAT_VERSIONS[-1]:
        raise MpqError(f"{path}: format {format} is newer than this mpq {__version__} reads ({known[-1]}); update mpq")
    raise MpqError(f"{path}: expected format {' or '.join(known)}, got {format!r}: not written by `mpq pack`")
