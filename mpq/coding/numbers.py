"""Whole numbers <-> bytes, each by a code table of its own: symbols by `mpq.coding.rans`, escapes as bits.

The bytes of a stream are the states and words of its symbols, followed by its escapes and whatever comes next, of which
the first bytes are in the lanes' tails instead (2 in each). A stream of no numbers takes no bytes.
"""

from collections.abc import Sequence

import numpy as np

from mpq.coding import rans
from mpq.coding.code_tables import code_tables
from mpq.coding.escapes import LONGEST, pack_escapes, unpack_escapes
from mpq.errors import MpqError

LARGEST = 1 << 24
"""The largest magnitude."""


def encode(streams: Sequence[np.ndarray], contexts: Sequence[np.ndarray], behind: Sequence[bytes]) -> list[bytes]:
    """Returns the bytes of each stream, and of what follows it.

    Args:
        streams: (n,) numbers of at most LARGEST, of each stream.
        contexts: (n,) the tables that they are coded by.
        behind: What follows each stream.
    """
    tables = code_tables()
    symbols, tails, rests = [], [], []
    for numbers, context, following in zip(streams, contexts, behind, strict=True):
        symbol = tables.symbols(numbers, context)
        at = np.flatnonzero(tables.is_escape[symbol])
        assert not np.abs(numbers[at]).max(initial=0) > LARGEST, "a number is above LARGEST"
        excess = np.abs(numbers[at]).astype(np.int64) - tables.largest[context[at]] - 1
        rest = pack_escapes(excess, numbers[at] < 0, tables.order[context[at]]) + following
        room = 2 * rans.lanes(len(numbers))
        symbols.append(symbol)
        tails.append(np.frombuffer(rest[:room].ljust(room, b"\0"), dtype="<u2"))
        rests.append(rest[room:])
    return [one + rest for one, rest in zip(rans.encode(symbols, tails, tables), rests, strict=True)]


def decode(data: Sequence[bytes], contexts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, bytes]]:
    """Returns the (n,) int32 numbers of each stream, and what follows it; zeros where that is shorter than the tails.

    Args:
        data: What `encode` returned for each stream.
        contexts: (n,) the tables of each stream's numbers.

    Raises:
        MpqError: The bytes are damaged.
    """
    tables = code_tables()
    decoded = []
    for one, context, (symbols, tails, end) in zip(data, contexts, rans.decode(data, contexts, tables), strict=True):
        numbers = tables.value[symbols]
        at = np.flatnonzero(tables.is_escape[symbols])
        rest = tails.astype("<u2").tobytes() + one[end:]
        order = tables.order[context[at]]
        excess, negative, size = unpack_escapes(rest[: -(-at.size * LONGEST // 8)], order)
        magnitude = tables.largest[context[at]] + 1 + excess
        if magnitude.max(initial=0) > LARGEST:
            raise MpqError(f"a weight's codes are damaged: expected none above {LARGEST}, got {magnitude.max()}")
        numbers[at] = np.where(negative, -magnitude, magnitude)
        decoded.append((numbers, rest[size:]))
    return decoded
