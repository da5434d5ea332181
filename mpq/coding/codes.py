"""Codes <-> bytes at their true width, for any width from 1 to 8 bits.

Codes form one stream of n-bit numbers, most significant bit first, without padding between them; the last byte is
filled with zeros. Three-level (2-bit symmetric) codes go five to a byte in base 3, since 3^5 = 243 <= 256: 1.6 bits
each. Sizes are exact: `packed_size` is the length of what `pack_codes` returns.
"""

import numpy as np

TERNARY = 3
"""`levels` of the one packing that is not a bit stream."""

_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)


def packed_size(count: int, levels: int) -> int:
    """Returns the bytes that `count` codes in [0, levels) take.

    >>> packed_size(16, 3), packed_size(16, 4), packed_size(16, 32)
    (4, 4, 10)
    """
    return -(-count // 5) if levels == TERNARY else -(-count * _width(levels) // 8)


def pack_codes(codes: np.ndarray, levels: int) -> bytes:
    """Returns the packed bytes of (n,) whole numbers in [0, levels)."""
    codes = np.ascontiguousarray(codes, dtype=np.uint8)
    assert codes.ndim == 1 and (not codes.size or codes.max() < levels), "codes outside [0, levels)"
    if levels == TERNARY:
        padded = np.zeros((packed_size(codes.size, levels), 5), dtype=np.uint16)
        padded.reshape(-1)[: codes.size] = codes
        return (padded @ _POWERS).astype(np.uint8).tobytes()
    bits = np.unpackbits(codes[:, None], axis=1)[:, 8 - _width(levels) :]  # (n, width)
    return np.packbits(bits).tobytes()


def unpack_codes(data: bytes, count: int, levels: int) -> np.ndarray:
    """Returns the (count,) uint8 codes in `packed_size(count, levels)` bytes."""
    packed = np.frombuffer(data, dtype=np.uint8)
    assert packed.size == packed_size(count, levels), "not the length that packed_size says"
    if levels == TERNARY:
        return (packed[:, None] // _POWERS % TERNARY).astype(np.uint8).reshape(-1)[:count]
    width = _width(levels)
    bits = np.unpackbits(packed, count=count * width).reshape(count, width)
    padded = np.zeros((count, 8), dtype=np.uint8)
    padded[:, 8 - width :] = bits
    return np.packbits(padded, axis=1).reshape(-1)


def _width(levels: int) -> int:
    """Returns the bits of a code: the smallest n with 2^n >= levels."""
    return max((levels - 1).bit_length(), 1)
