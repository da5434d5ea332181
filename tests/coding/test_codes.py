"""Codes to bytes and back, against a bit string built by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.coding.codes import TERNARY, pack_codes, packed_size, unpack_codes


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_stream_of_bits(width: int, values: list[int]) -> None:
    codes = [value % 2**width for value in values]
    packed = pack_codes(np.array(codes, dtype=np.uint8), 2**width)
    text = "".join(f"{code:0{width}b}" for code in codes)
    expected = bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    assert packed == expected
    assert len(packed) == packed_size(len(codes), 2**width) == -(-len(codes) * width // 8)
    assert unpack_codes(packed, len(codes), 2**width).tolist() == codes


@given(st.lists(st.integers(0, 2), max_size=40))
def test_three_levels_go_five_to_a_byte(codes: list[int]) -> None:
    packed = pack_codes(np.array(codes, dtype=np.uint8), TERNARY)
    padded = codes + [0] * (-len(codes) % 5)
    expected = [int("".join(map(str, padded[i : i + 5])), 3) for i in range(0, len(padded), 5)]
    assert list(packed) == expected
    assert len(packed) == packed_size(len(codes), TERNARY)
    assert unpack_codes(packed, len(codes), TERNARY).tolist() == codes


def test_levels_of_a_symmetric_code_take_its_nominal_width() -> None:
    for bits in range(3, 9):
        assert packed_size(1000, 2**bits - 1) == 1000 * bits // 8


def test_codes_outside_the_range_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        pack_codes(np.array([4], dtype=np.uint8), 4)
