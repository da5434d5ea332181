"""Whole numbers <-> bytes, each by a code table of its own: symbols by `mpq.artifact.rans`, escapes as bits.

The bytes of a stream of n numbers are the states and words of its symbols, and then what the lanes' tails (2 bytes a
lane, the first of the escapes' bytes) do not hold of the escapes. A stream of none takes no bytes.
"""

from collections.abc import Sequence

import numpy as np

from mpq.artifact import rans
from mpq.artifact.code_tables import code_tables
from mpq.artifact.escapes import LONGEST, pack_escapes, unpack_escapes
from mpq.errors import MpqError

LARGEST = 1 << 24
"""The largest magnitude."""


def encode(streams: Sequence[np.ndarray], contexts: Sequence[np.ndarray]) -> list[bytes]:
    """Returns the bytes of each stream: (n,) numbers of at most LARGEST and (n,) the tables that they are coded by."""
    tables = code_tables()
    symbols = [tables.symbols(numbers, context) for numbers, context in zip(streams, contexts, strict=True)]
    tails, rests = [], []
    for numbers, context, symbol in zip(streams, contexts, symbols, strict=True):
        at = np.flatnonzero(tables.is_escape[symbol])
        assert not np.abs(numbers[at]).max(initial=0) > LARGEST, "a number is above LARGEST"
        excess = np.abs(numbers[at]).astype(np.int64) - tables.largest[context[at]] - 1
        escapes = pack_escapes(excess, numbers[at] < 0, tables.order[context[at]])
        room = 2 * rans.lanes(len(numbers))
        tails.append(np.frombuffer(escapes[:room].ljust(room, b"\0"), dtype="<u2"))
        rests.append(escapes[room:])
    return [one + rest for one, rest in zip(rans.encode(symbols, tails, tables), rests, strict=True)]


def decode(data: Sequence[bytes], contexts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Returns the (n,) int32 numbers of each stream, and how many bytes it took.

    Args:
        data: What `encode` returned for each stream, and anything behind it.
        contexts: (n,) the tables of each stream's numbers.

    Raises:
        MpqError: The bytes are damaged.
    """
    tables = code_tables()
    decoded = []
    for one, context, (symbols, tails, end) in zip(data, contexts, rans.decode(data, contexts, tables), strict=True):
        numbers = tables.value[symbols]
        at = np.flatnonzero(tables.is_escape[symbols])
        if at.size:
            table, room = context[at], 2 * len(tails)
            rest = one[end : end + at.size * LONGEST // 8 + 1]
            excess, negative, size = unpack_escapes(tails.astype("<u2").tobytes() + rest, tables.order[table])
            magnitude = tables.largest[table] + 1 + excess
            if magnitude.max() > LARGEST:
                raise MpqError(f"a weight's codes are damaged: expected none above {LARGEST}, got {magnitude.max()}")
            numbers[at] = np.where(negative, -magnitude, magnitude)
            end += max(size - room, 0)
        decoded.append((numbers, end))
    return decoded
