"""Numbers with a table each, there and back, and as a plain decoder reads them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_rans import scalar_decode

from mpq.coding import numbers
from mpq.errors import MpqError

one_number = st.tuples(st.integers(1, 205), st.integers(-3, 3) | st.integers(-(2**24), 2**24))


@given(st.lists(one_number | st.just((0, 0)), max_size=40), st.binary(max_size=5))
def test_there_and_back(pairs: list[tuple[int, int]], behind: bytes) -> None:
    context = np.array([table for table, _ in pairs], dtype=np.uint16)
    values = np.array([value for _, value in pairs], dtype=np.int32)
    (data,) = numbers.encode([values], [context], [behind])
    ((found, rest),) = numbers.decode([data], [context])
    assert found.tolist() == values.tolist()
    assert rest[: len(behind)] == behind and rest[len(behind) :] in (b"", b"\0", b"\0\0")
    assert scalar_decode(data, context.tolist()) == (values.tolist(), rest)


def test_several_lanes_with_escapes() -> None:
    random = np.random.default_rng(1)
    values = np.rint(random.standard_t(2, 40000) * 3).astype(np.int32)
    context = np.full(40000, 62, dtype=np.uint16)
    (data,) = numbers.encode([values], [context], [b"more"])
    assert scalar_decode(data, context.tolist()) == (values.tolist(), b"more")
    ((found, rest),) = numbers.decode([data], [context])
    assert (found == values).all() and rest == b"more"


def test_two_bytes_behind_cost_nothing() -> None:
    """They are in the lane's tail, and so are the bits of a first escape."""
    context, values = np.full(1000, 62, dtype=np.uint16), np.zeros(1000, dtype=np.int32)
    (plain,) = numbers.encode([values], [context], [b""])
    assert len(numbers.encode([values], [context], [b"ab"])[0]) == len(plain)
    values[500] = 90
    assert len(numbers.encode([values], [context], [b""])[0]) <= len(plain) + 2  # the escape's symbol


def test_certain_zeros_take_the_state_alone() -> None:
    (data,) = numbers.encode([np.zeros(8000, dtype=np.int32)], [np.zeros(8000, dtype=np.uint16)], [b""])
    assert data == (1 << 16).to_bytes(4, "little")
    assert numbers.encode([np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.uint16)], [b"ab"]) == [b"ab"]


def test_a_number_above_the_largest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    context = np.full(3, 42, dtype=np.uint16)
    monkeypatch.setattr(numbers, "LARGEST", 2**25)
    (data,) = numbers.encode([np.array([0, 2**24 + 1, 0])], [context], [b""])
    monkeypatch.undo()
    with pytest.raises(MpqError, match=r"expected none above 16777216, got 16777217"):
        numbers.decode([data], [context])
