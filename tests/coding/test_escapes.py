"""Escapes as bits, by hand and there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.coding.escapes import LONGEST, escape_bits, pack_escapes, unpack_escapes
from mpq.errors import MpqError


def test_two_numbers_by_hand() -> None:
    """0 of order 0: p = 1, no zeros, sign 0. -5 of order 1: p = 3 = 0b11, one zero; low bits 1 and 1, sign 1."""
    packed = pack_escapes(np.array([0, 5]), np.array([False, True]), np.array([0, 1]))
    assert packed == bytes([int("1" + "01" + "0" + "111" + "0", 2)])


numbers = st.lists(st.tuples(st.integers(0, 2**24) | st.integers(0, 20), st.booleans(), st.integers(0, 6)), max_size=30)


@given(numbers, st.binary(max_size=3))
def test_there_and_back(escapes: list[tuple[int, bool, int]], behind: bytes) -> None:
    excess, negative, order = (np.array([e[i] for e in escapes], dtype=np.int64) for i in range(3))
    packed = pack_escapes(excess, negative.astype(bool), order)
    bits = escape_bits(excess, order)
    assert len(packed) == -(-int(bits.sum()) // 8) and bits.max(initial=0) <= LONGEST
    found, signs, size = unpack_escapes(packed + behind, order)
    assert (found.tolist(), signs.tolist(), size) == (excess.tolist(), negative.astype(bool).tolist(), len(packed))


@given(st.binary(max_size=40), st.lists(st.integers(0, 6), max_size=9))
def test_any_bytes_are_read_or_refused(data: bytes, orders: list[int]) -> None:
    try:
        excess, _, size = unpack_escapes(data, np.array(orders, dtype=np.int64))
    except MpqError:
        return
    assert len(excess) == len(orders) and size <= len(data) and (excess >= 0).all()


@pytest.mark.parametrize("data", [b"", bytes(9), b"\x00\x00\x00\x40" + bytes(9), b"\x01"])
def test_damage(data: bytes) -> None:
    with pytest.raises(MpqError, match="large codes"):
        unpack_escapes(data, np.array([0]))
