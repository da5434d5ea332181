"""The `.nemo` archive: a tar (old ones gzipped) of `model_config.yaml`, `model_weights.ckpt` and a tokenizer's files.

It is read in memory: nothing is extracted, nothing is unpickled but tensors, and no name may lead out of it.
"""

import bz2
import gzip
import io
import lzma
import math
import os
import pickle
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from mpq.errors import MpqError
from mpq.files import file_start, foreign_content

CONFIG_FILE = "model_config.yaml"
WEIGHTS_FILE = "model_weights.ckpt"
_MOST_GROWTH, _LEAST_ROOM = 20, 1 << 26
"""A compressed archive may unpack to so many times its size, or to so many bytes: weights hardly shrink."""
_UNPACKERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


def nemo_files(path: Path) -> tuple[Path, ...]:
    """Returns the file itself if it is called `.nemo`, or is a tar archive, whatever its name; else none."""
    is_one = not path.is_dir() and (path.suffix == ".nemo" or tarfile.is_tarfile(path))
    return (path,) if is_one else ()


def read_members(path: Path) -> dict[str, bytes]:
    """Returns {normalised name: content} of an archive's files, refusing names and links that leave it, and bombs."""
    members = {}
    try:
        with _tar(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                name = posixpath.normpath(entry.name)
                if name.startswith(("/", "..")) or entry.islnk() or entry.issym():
                    raise MpqError(f"{path}: the member {entry.name!r} is a link or leaves the archive; refused")
                if entry.issparse():
                    raise MpqError(f"{path}: the member {entry.name!r} is sparse, of {entry.size} bytes; refused")
                if entry.isfile():
                    content = archive.extractfile(entry)
                    assert content is not None
                    members[name] = content.read()
    except FileNotFoundError:
        raise MpqError(f"{path}: no such file") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        what = foreign_content(file_start(path)) or f"{reason}; copy or download it again"
        raise MpqError(f"{path}: not a whole .nemo (tar) archive: {what}") from None
    return members


@contextmanager
def _tar(path: Path) -> Iterator[IO[bytes]]:
    """Yields the tar file, unpacked to its end where it is compressed: the checksum is there."""
    with open(path, "rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), None)
        if unpack is None:
            yield raw
            return
        most = max(_LEAST_ROOM, _MOST_GROWTH * os.fstat(raw.fileno()).st_size)
        data: bytes = unpack(raw).read(most + 1)
    if len(data) > most:
        raise MpqError(f"{path}: unpacks to more than {_MOST_GROWTH} times its size, as no weights do; refused")
    yield io.BytesIO(data)


def member(path: Path, members: dict[str, bytes], name: str, why: str) -> bytes:
    """Returns the content of a member, or raises MpqError, which says why it is needed."""
    if name not in members:
        raise MpqError(
            f"{path}: {why} {name!r}: no such member; the archive has {', '.join(sorted(members)) or 'none'}"
        )
    return members[name]


def read_yaml(path: Path, members: dict[str, bytes]) -> Any:
    """Returns the content of model_config.yaml.

    Raises:
        MpqError: No such member, or not plain YAML.
    """
    text = member(path, members, CONFIG_FILE, "configuration")
    try:
        if _items(yaml.compose(text, Loader=yaml.SafeLoader), {}) > 10 * len(text):
            raise ValueError(f"its aliases (&, *) stand for far more than its {len(text)} characters; write them out")
        return yaml.safe_load(text.decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MpqError(f"{path}: {CONFIG_FILE}: not plain YAML: {' '.join(str(error).split())[:200]}") from None


def _items(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Returns how many items a YAML node has, aliases written out; infinity for one that holds itself."""
    if node is None or id(node) in known:
        return known.get(id(node), 0)
    known[id(node)] = math.inf
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = 1 + sum(_items(one, known) for one in inner)
    return known[id(node)]


def _check_crc(path: Path, data: bytes) -> None:
    """Raises MpqError if a member of the zip file that torch.save writes is not as it was: torch.load does not look."""
    if not zipfile.is_zipfile(io.BytesIO(data)):  # of torch before 1.6; it has no checksum
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            stored = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
            if len(stored) < len(archive.infolist()) or sum(entry.file_size for entry in stored) > len(data):
                raise MpqError(f"{path}: {WEIGHTS_FILE}: compressed or overlapping members, which torch does not write")
            has_checksums = any(entry.CRC for entry in stored)  # torch can be told to write none
            damaged = archive.testzip() if has_checksums else None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError) as error:
        raise MpqError(f"{path}: {WEIGHTS_FILE}: damaged: {error}; copy the file again") from None
    if damaged:
        raise MpqError(f"{path}: {WEIGHTS_FILE}: damaged: {damaged} does not match its checksum; copy the file again")


def read_weights(path: Path, members: dict[str, bytes]) -> dict[str, Tensor]:
    """Returns {name: tensor} of model_weights.ckpt, floating-point ones as float32.

    Raises:
        MpqError: No such member, or not a plain dictionary of real tensors.
    """
    data = member(path, members, WEIGHTS_FILE, "weights")
    _check_crc(path, data)
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        is_torch = data.startswith((b"PK", b"\x80"))
        reason = (None if is_torch else foreign_content(data[:512])) or " ".join(str(error).split())[:200]
        raise MpqError(f"{path}: {WEIGHTS_FILE}: not a plain dictionary of tensors (refused): {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MpqError(
            f"{path}: {WEIGHTS_FILE}: expected a dictionary of tensors and nothing else, got {_other(state)}"
        )
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise MpqError(f"{path}: {WEIGHTS_FILE}: tensor {name}: expected plain real numbers, got {tensor.dtype}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _other(state: Any) -> str:
    """Returns what was saved where weights were expected, and what to do."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}; save the model's state_dict()"
    if wrapped := _wrapped(state):
        keys = "".join(f"[{key!r}]" for key in wrapped)
        return (
            f"a dictionary that has them at {keys}, as trainers save checkpoints; save these alone as {WEIGHTS_FILE} "
            f"(torch.save(checkpoint{keys}, ...)) and make the archive again"
        )
    name, value = next((name, value) for name, value in state.items() if not isinstance(value, Tensor))
    return f"a {type(value).__name__} at {str(name)[:60]!r}; save the model's state_dict()"


def _wrapped(state: dict[Any, Any], depth: int = 3) -> list[Any] | None:
    """Returns the keys that lead to a dictionary of tensors inside another, the first that there is."""
    for key, value in state.items():
        if isinstance(value, dict) and value and depth:
            if all(isinstance(one, Tensor) for one in value.values()):
                return [key]
            if inner := _wrapped(value, depth - 1):
                return [key, *inner]
    return None
