"""A model less its quantized weights <-> the parts of a packed file. docs/artifact-format.md describes the bytes.

Version 1 of the format has biases, norms and statistics in half or single precision; version 2, which entropy-coded
weights have, folds them (`mpq.models.folding`) and codes them too (`mpq.artifact.rest`).
"""

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mpq.artifact.rest import decode_rest, encode_rest
from mpq.artifact.tokenizer import decode_tokenizer, encode_tokenizer
from mpq.artifact.weights import (
    Cursor,
    WeightFormat,
    decode_layers,
    float_bytes,
    layer_length,
    read_floats,
    take_layer,
)
from mpq.coding.compression import compressed, decompressed
from mpq.errors import MpqError
from mpq.models.base import AsrModel, is_counter, load_state
from mpq.models.families import family_class
from mpq.models.folding import folded_state
from mpq.quantization.spec import as_width

MILLIBITS = 1000
"""Rates are stored in thousandths of a bit."""

_LARGEST_MANIFEST = 1 << 26
"""Bytes of names and options: a hundred for each of 600,000 tensors."""
_XZ_MEMORY = 1 << 28
"""The dictionary of xz's highest preset takes 65 MB."""


def version_of(weight_format: WeightFormat) -> int:
    """Returns the version of the format that a file has."""
    return 2 if weight_format.spec.record.is_entropy_coded else 1


def fold_as_stored(model: AsrModel, weight_format: WeightFormat) -> None:
    """Folds a model in place if its file holds it so; its function stays, and what its layers hear may change.

    Whatever measures or rounds weights has to hear what they will hear in the file.
    """
    if version_of(weight_format) == 2:
        load_state(model, folded_state(model))


def parts_of(model: AsrModel, weight_format: WeightFormat, like: AsrModel | None = None) -> dict[str, bytes]:
    """Returns all parts of the file but `weights`; `bits` is a placeholder of the right length.

    Args:
        model: The float model.
        weight_format: The quantizer, and how weights are stored.
        like: As in `mpq.artifact.file.write_artifact`.
    """
    names = [ref.name for ref in model.weights()]
    config, tokenizer = model.to_config()
    manifest: dict[str, Any] = {"model": config, "quantizer": weight_format.to_json()}
    bits = stored_widths([0.0] * len(names), weight_format)
    if version_of(weight_format) == 2:
        state, (trained, other) = folded_state(model), _rest_names(model)
        rest = encode_rest(state, trained) if weight_format.rest_dtype == "coded" else _floats(state, trained)
        return {
            "rest": rest,
            "exact": _floats(state, other),
            "manifest": compressed(_json(manifest)),
            "tokenizer": encode_tokenizer(tokenizer),
            "bits": bits,
        }
    decides, state = (like or model).state_dict(), model.state_dict()
    halves: dict[str, bytes] = {}
    exact: dict[str, bytes] = {}
    trained, other = _rest_names(model)
    for name, tensor in state.items():
        if name in trained and _stays_half(name, decides[name], weight_format):
            halves[name] = float_bytes(tensor, weight_format.rest_dtype)
        elif name in trained or name in other:
            exact[name] = float_bytes(tensor, "float32")
    manifest |= {"weights": names, "rest": list(halves), "exact": list(exact)}
    return {
        "rest": b"".join(halves.values()),
        "exact": lzma.compress(b"".join(exact.values()), preset=9),
        "manifest": lzma.compress(_json(manifest), preset=9),
        "tokenizer": tokenizer,
        "bits": bits,
    }


def model_of(parts: Mapping[str, bytes], version: int) -> AsrModel:
    """Returns the model in the parts of a file, `weights` included.

    Raises:
        MpqError, KeyError, ValueError, TypeError, lzma.LZMAError, RuntimeError: The parts contradict each other.
    """
    packed = parts["manifest"]
    text = decompressed(packed, _LARGEST_MANIFEST) if version == 2 else _decompressed(packed, _LARGEST_MANIFEST)
    manifest = json.loads(text)
    weight_format = WeightFormat.from_json(manifest["quantizer"])
    if version != version_of(weight_format):
        raise MpqError(f"scheme {weight_format.spec.scheme} in a file of version {version}")
    tokenizer = decode_tokenizer(parts["tokenizer"]) if version == 2 else parts["tokenizer"]
    model = family_class(manifest["model"]["family"]).from_config(manifest["model"], tokenizer)
    refs = {ref.name: ref for ref in model.weights()}
    names = list(refs) if version == 2 else manifest["weights"]
    widths = dict(zip(names, _read_widths(parts["bits"], weight_format), strict=True))
    shapes = {name: refs[name].shape for name in widths}
    cursor = Cursor(parts["weights"])
    stored = {name: take_layer(cursor, shapes[name], width, weight_format) for name, width in widths.items()}
    state = decode_layers(stored, shapes, widths, weight_format)
    rest = _coded_rest(parts, model, weight_format) if version == 2 else _float_rest(parts, model, manifest)
    load_state(model, state | dict(rest))
    model.quantized_bits = widths
    model.quantized_bytes = {name: layer_length(data, widths[name], weight_format) for name, data in stored.items()}
    return model


def exact_names(model: AsrModel, weight_format: WeightFormat) -> set[str]:
    """Returns the trained tensors that half precision would spoil, so that the file has them compressed in full.

    How many bytes they take depends on their values. In version 2 there are none.
    """
    if version_of(weight_format) == 2:
        return set()
    state, (trained, _) = model.state_dict(), _rest_names(model)
    return {name for name in trained if not _stays_half(name, state[name], weight_format)}


def stored_widths(widths: Sequence[float], weight_format: WeightFormat) -> bytes:
    """Returns the part `bits`: a byte for each width, or two bytes in thousandths of a bit where they are rates."""
    if version_of(weight_format) == 2:
        return np.array([round(width * MILLIBITS) for width in widths], dtype="<u2").tobytes()
    return bytes(int(width) for width in widths)


def _read_widths(data: bytes, weight_format: WeightFormat) -> list[float]:
    """Returns the widths that `stored_widths` wrote."""
    if version_of(weight_format) == 2:
        return [as_width(number / MILLIBITS) for number in np.frombuffer(data, dtype="<u2").tolist()]
    return list(data)


def _rest_names(model: AsrModel) -> tuple[list[str], list[str]]:
    """Returns what is not quantized: the trained tensors, running statistics among them, and the others."""
    weights = {ref.name for ref in model.weights()}
    statistics = {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    known = statistics | {name for name, _ in model.named_parameters()}
    names = [name for name in model.state_dict() if name not in weights and not is_counter(name)]
    return [name for name in names if name in known], [name for name in names if name not in known]


def _coded_rest(parts: Mapping[str, bytes], model: AsrModel, weight_format: WeightFormat) -> dict[str, Tensor]:
    """Returns {name: tensor} of what version 2 stores of a model like this besides its weights."""
    own, (trained, other) = model.state_dict(), _rest_names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if weight_format.rest_dtype == "coded":
        found = decode_rest(parts["rest"], {name: shapes[name] for name in trained})
    else:
        found = _read_all_floats(parts["rest"], {name: shapes[name] for name in trained})
    return found | _read_all_floats(parts["exact"], {name: shapes[name] for name in other})


def _float_rest(
    parts: Mapping[str, bytes], model: AsrModel, manifest: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the tensor of what version 1 stores of a model like this besides its weights."""
    own = model.state_dict()
    for blob, dtype in (("rest", manifest["quantizer"]["rest_dtype"]), ("exact", "float32")):
        width = np.dtype(dtype).itemsize
        most = sum(own[name].numel() for name in manifest[blob]) * width
        cursor = Cursor(parts[blob] if blob == "rest" else _decompressed(parts[blob], most))
        for name in manifest[blob]:
            yield name, read_floats(cursor.take(own[name].numel() * width), tuple(own[name].shape), dtype)


def _json(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, ensure_ascii=False, sort_keys=True).encode()


def _floats(state: Mapping[str, Tensor], names: Sequence[str]) -> bytes:
    """Returns tensors in single precision, compressed."""
    return compressed(b"".join(float_bytes(state[name], "float32") for name in names), is_floats=True)


def _read_all_floats(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Returns the tensors that `_floats` stored."""
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    cursor = Cursor(decompressed(data, sum(sizes.values()), is_floats=True))
    return {name: read_floats(cursor.take(sizes[name]), shape, "float32") for name, shape in shapes.items()}


def _decompressed(data: bytes, most: int) -> bytes:
    """Returns what xz has compressed; raises MpqError where that is more than `most` bytes."""
    decompressor = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
    found = decompressor.decompress(data, most + 1)
    if len(found) > most or not decompressor.eof:
        raise MpqError(f"a compressed part that is cut off, or larger than the {most} bytes that it may have")
    return found


def _stays_half(name: str, tensor: Tensor, weight_format: WeightFormat) -> bool:
    """Returns whether rest_dtype keeps a tensor to 2^-10 of its largest value (a variance: of each value)."""
    if weight_format.rest_dtype == "float32":
        return True
    error = (tensor.half().float() - tensor).abs()
    reference = tensor.abs() if name.endswith("running_var") else tensor.abs().amax()
    return bool((error <= 2**-10 * reference).all())  # false for infinity and NaN too
