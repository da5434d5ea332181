"""A SentencePiece model <-> few bytes.

Nine tenths of a small SentencePiece model are the table of its normalisation rule, which says what characters become,
and most of those are the double array of a trie, which is stored as a trie (`mpq.coding.double_array`). (The library
brings such tables along, and they need not be stored at all. But they change from release to release, as between 0.2.0,
0.2.1 and 0.2.3, so that a file could be read with the release alone that wrote it.)

The bytes: the place of the array in the model, 0 if none is left out; the length of the next part (4 bytes each,
little-endian); the model without the array, as a stream of LZMA2; the array as `double_array.to_streams` returns it, as
a second one.
"""

import lzma

from mpq.coding.compression import compressed, decompressed
from mpq.coding.double_array import from_streams, to_streams
from mpq.errors import MpqError

_LARGEST = 1 << 28
"""Bytes of a tokenizer."""
_NORMALIZER, _TABLE = 3, 2
"""The field `normalizer_spec` of a ModelProto, and its field `precompiled_charsmap`: the length of the array in bytes
(4 bytes, little-endian), the array, and the strings that its values are the places of (sentencepiece_model.proto)."""


def encode_tokenizer(blob: bytes) -> bytes:
    """Returns the bytes of a tokenizer.

    Args:
        blob: What `AsrModel.to_config` returned: an xz-compressed SentencePiece model, or nothing.
    """
    if not blob:
        return b""
    model = lzma.decompress(blob)
    start, end = _array(model)
    trie = to_streams(model[start:end])
    if trie is None or start == end:
        start, end, trie = 0, 0, b""
    rest = compressed(model[:start] + model[end:])
    return start.to_bytes(4, "little") + len(rest).to_bytes(4, "little") + rest + compressed(trie)


def decode_tokenizer(data: bytes) -> bytes:
    """Returns a blob for `AsrModel.from_config` with the SentencePiece model that `encode_tokenizer` was given.

    Raises:
        MpqError: The bytes are damaged.
    """
    if not data:
        return b""
    start, size = (int.from_bytes(data[place : place + 4], "little") for place in (0, 4))
    model, trie = (decompressed(part, _LARGEST) for part in (data[8 : 8 + size], data[8 + size :]))
    if start > len(model) or len(data) < 8 + size or bool(start) != bool(trie):
        raise MpqError("the tokenizer is damaged")
    array = from_streams(trie) if trie else b""
    return lzma.compress(model[:start] + array + model[start:], preset=0)


def _array(model: bytes) -> tuple[int, int]:
    """Returns where the double array of a SentencePiece model begins and ends; (0, 0) if it has none."""
    try:
        start, end = 0, len(model)
        for number in (_NORMALIZER, _TABLE):
            start, end = _field(model, start, end, number)
        size = int.from_bytes(model[start : start + 4], "little")
    except IndexError:
        return 0, 0
    return (start + 4, start + 4 + size) if start + 4 + size <= end else (0, 0)


def _field(message: bytes, start: int, end: int, number: int) -> tuple[int, int]:
    """Returns where the bytes of a field of a protobuf message begin and end; raises IndexError if it has none."""
    while start < end:
        key, start = _varint(message, start)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 in (0, 2):  # a number, or bytes after their number
            value, start = _varint(message, start)
            size = value if key & 7 == 2 else 0
        if key == number << 3 | 2:
            return start, start + size
        start += size
    raise IndexError


def _varint(message: bytes, start: int) -> tuple[int, int]:
    """Returns the number at a place, 7 bits in each byte and the lowest first, and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = message[start]
        value, shift, start = value | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128:
            return value, start
