"""Compressed parts: round trips, bounds and damage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.coding.compression import compressed, decompressed
from mpq.errors import MpqError


@pytest.mark.parametrize("is_floats", [False, True])
@pytest.mark.parametrize("data", [b"", b"a", b"\0" * 5000, bytes(range(256)) * 9])
def test_a_round_trip(data: bytes, is_floats: bool) -> None:
    assert decompressed(compressed(data, is_floats), len(data), is_floats) == data


def test_nothing_takes_nothing_and_floats_take_less() -> None:
    assert compressed(b"") == b""
    window = np.hanning(400).astype("<f4").tobytes()
    assert len(compressed(window, is_floats=True)) < len(compressed(window)) < len(window)


def test_more_than_expected_is_refused() -> None:
    with pytest.raises(MpqError, match="larger than the 99 bytes"):
        decompressed(compressed(b"\0" * 100), 99)


@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_damage_is_refused_or_gives_other_bytes(place: int, value: int, is_cut: bool) -> None:
    data = bytearray(compressed(bytes(range(200)) * 3))
    if is_cut:
        del data[place % len(data) :]
    else:
        data[place % len(data)] = value
    try:
        assert len(decompressed(bytes(data), 600)) <= 600
    except MpqError as error:
        assert "damaged" in str(error)
