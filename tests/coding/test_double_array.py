"""Double arrays as tries: an array by hand, a reader of the original, damage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_damage import damaged
from tiny_tokenizers import double_array

from mpq.coding.compression import compressed
from mpq.coding.double_array import from_streams, to_streams
from mpq.errors import MpqError


def units(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<u4").tobytes()


def unit(label: int, offset: int, has_value: bool = False) -> int:
    return label | has_value << 8 | offset << 10


BY_HAND = units(
    unit(0, 4),  # the root has the base 4
    7,  # not in the trie
    1 << 31 | 9,  # the value at the base of the node that 5 and 6 lead to
    99 << 10,  # not in the trie
    1 << 31 | 30,  # not in the trie either, for no unit says that its node has a value
    unit(1, 5 ^ 2, True),  # child 1 of base 4
    unit(2, 6 ^ 2, True),  # child 2 of base 4, the same node
)


def test_an_array_by_hand() -> None:
    data = to_streams(BY_HAND)
    assert data is not None and from_streams(data) == BY_HAND
    sizes = np.frombuffer(data[:32], dtype="<u4").tolist()
    assert sizes == [7, 3, 2, 2, 2, 1, 1, 3]
    assert list(data[32:39]) == [1, 2, 0, 2, 0, 1, 2]  # kinds, counts, labels


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf"])
def test_the_tables_of_sentencepiece_take_a_third(rule: str) -> None:
    array = double_array(rule)
    data = to_streams(array)
    assert data is not None and from_streams(data) == array
    assert len(compressed(data)) < 0.32 * len(compressed(array)) < 0.5 * len(array)


def test_a_far_offset_is_kept_without_its_last_bits() -> None:
    size = (1 << 21) + 512
    numbers = np.zeros(size, dtype="<u4")
    base = (1 << 21) + 256
    numbers[0] = base << 2 | 1 << 9  # offset >> 8 << 10
    numbers[base ^ 1] = unit(1, 0)
    data = to_streams(numbers.tobytes())
    assert data is not None and from_streams(data) == numbers.tobytes()


@pytest.mark.parametrize("array", [b"", units(0), units(unit(0, 0)), units(1 << 31 | 5)])
def test_arrays_of_none_or_one(array: bytes) -> None:
    data = to_streams(array)
    assert data is None or from_streams(data) == array


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_what_is_no_trie_is_kept_or_left_alone(numbers: list[int]) -> None:
    array = units(*numbers)
    data = to_streams(array)
    assert data is None or from_streams(data) == array


@given(st.binary(max_size=60))
def test_bytes_that_are_no_array_are_left_alone(array: bytes) -> None:
    data = to_streams(array)
    assert data is None or from_streams(data) == array


@given(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 2))
def test_damage_is_refused_or_gives_another_array(place: int, value: int, kind: int) -> None:
    streams = to_streams(BY_HAND)
    assert streams is not None
    data = damaged(streams, place, value, kind)
    try:
        found = from_streams(data)
        assert kind == 2 and len(found) == len(BY_HAND)
    except MpqError as error:
        assert "damaged" in str(error)
