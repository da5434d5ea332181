"""Bytes <-> fewer bytes, by LZMA without a container: the file has a checksum of its own."""

import lzma
from typing import Any

from mpq.errors import MpqError

_LZMA2: dict[str, Any] = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
_FILTERS = [{**_LZMA2, "lc": 4, "lp": 0, "pb": 0}]
"""The context of a byte is the half of the byte before it."""
_FLOATS = [{**_LZMA2, "lc": 0, "lp": 2, "pb": 2}]
"""The context of a byte is its place in its number of four."""


def compressed(data: bytes, is_floats: bool = False) -> bytes:
    """Returns a stream of LZMA2; nothing for nothing. With `is_floats` it is shorter for float32 numbers."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_FLOATS if is_floats else _FILTERS) if data else b""


def decompressed(data: bytes, most: int, is_floats: bool = False) -> bytes:
    """Returns what `compressed` took.

    Raises:
        MpqError: The data are damaged, or of more than `most` bytes.
    """
    if not data:
        return b""
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FLOATS if is_floats else _FILTERS)
    try:
        found = decompressor.decompress(data, most + 1)
    except lzma.LZMAError as error:
        raise MpqError(f"a compressed part is damaged: {error}") from None
    if len(found) > most or not decompressor.eof or decompressor.unused_data:
        raise MpqError(f"a compressed part is cut off or damaged, or larger than the {most} bytes that it may have")
    return found
