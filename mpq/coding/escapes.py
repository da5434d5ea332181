"""Rare large numbers as bits: what a code table has no symbol for (`mpq.coding.code_tables`).

A number that is m above the largest magnitude of its table, m >= 0, is written in an Exp-Golomb code of the table's
order k: with p = floor(m / 2^k) + 1, of 1 + c bits, these are c zeros and a one; the c lower bits of p; the k lower
bits of m; the sign, 1 for negative. The zeros and ones of all numbers come first, then the remaining bits of each: so
both can be found at once, without a loop over the numbers.
"""

import numpy as np

from mpq.errors import MpqError

_MOST = 24
"""The most zeros of a number up to 2^24."""
LONGEST = 2 * _MOST + 2 + 6
"""The most bits of a number: the largest order is 6."""


def escape_bits(excess: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns how many bits numbers take that are `excess` above the largest magnitude of a table of this order."""
    bits: np.ndarray = 2 * _width(excess, order) + order + 2
    return bits


def pack_escapes(excess: np.ndarray, negative: np.ndarray, order: np.ndarray) -> bytes:
    """Returns the bytes of (n,) numbers: how far above the largest magnitudes, whether negative, the tables' orders."""
    width = _width(excess, order)
    prefix = np.zeros(int((width + 1).sum()), dtype=np.uint8)
    prefix[np.cumsum(width + 1) - 1] = 1
    low = (((excess >> order) + 1 - (1 << width)) << order) + (excess & ((1 << order) - 1))
    owner, shift = _fields(width + order + 1)
    return np.packbits(np.concatenate([prefix, ((2 * low + negative)[owner] >> shift) & 1])).tobytes()


def unpack_escapes(data: bytes, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns how far above, whether negative, and the bytes read.

    Args:
        data: What `pack_escapes` returned, and anything behind it.
        order: (n,) the order of each number's table.

    Raises:
        MpqError: The bytes end early, or a number is far above 2^24.
    """
    if not len(order):
        return order, order != 0, 0
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    ends = np.flatnonzero(bits)[: len(order)]
    width = np.diff(ends, prepend=-1) - 1
    if len(ends) < len(order) or width.max() > _MOST:
        raise MpqError("the large codes of a weight are damaged: expected a shorter run of zeros")
    owner, shift = _fields(width + order + 1)
    start = int(ends[-1]) + 1
    if start + len(owner) > len(bits):
        raise MpqError("the large codes of a weight are damaged: expected more bits")
    field = bits[start : start + len(owner)].astype(np.int64) << shift
    number = np.add.reduceat(field, np.flatnonzero(np.diff(owner, prepend=-1)))
    excess = (((number >> 1 >> order) + (1 << width) - 1) << order) + (number >> 1 & ((1 << order) - 1))
    return excess, (number & 1).astype(bool), -(-(start + len(owner)) // 8)


def _width(excess: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns floor(log2(floor(excess / 2^order) + 1)), exactly."""
    exponent: np.ndarray = np.frexp(((excess >> order) + 1).astype(np.float64))[1]
    return exponent.astype(np.int64) - 1


def _fields(width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which field each bit of fields of these widths belongs to, and its place value's exponent."""
    owner = np.repeat(np.arange(len(width)), width)
    return owner, (np.cumsum(width)[owner] - 1 - np.arange(len(owner)))
