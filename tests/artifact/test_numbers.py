"""Numbers with a table each, there and back, and as a plain decoder reads them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tiny_rans import scalar_decode

from mpq.artifact import numbers

one_number = st.tuples(st.integers(1, 205), st.integers(-3, 3) | st.integers(-(2**24), 2**24))


@given(st.lists(one_number | st.just((0, 0)), max_size=40), st.binary(max_size=5))
def test_there_and_back(pairs: list[tuple[int, int]], behind: bytes) -> None:
    context = np.array([table for table, _ in pairs], dtype=np.uint16)
    values = np.array([value for _, value in pairs], dtype=np.int32)
    (data,) = numbers.encode([values], [context])
    ((found, size),) = numbers.decode([data + behind], [context])
    assert found.tolist() == values.tolist() and size == len(data)
    assert scalar_decode(data + behind, context.tolist()) == (values.tolist(), len(data))


def test_several_lanes_with_escapes() -> None:
    random = np.random.default_rng(1)
    values = np.rint(random.standard_t(2, 20000) * 3).astype(np.int32)
    context = np.full(20000, 62, dtype=np.uint16)
    (data,) = numbers.encode([values], [context])
    assert scalar_decode(data, context.tolist()) == (values.tolist(), len(data))
    assert (numbers.decode([data], [context])[0][0] == values).all()


def test_the_first_escapes_cost_nothing_more() -> None:
    """Two bytes of escapes are in the lane's tail."""
    context, values = np.full(1000, 62, dtype=np.uint16), np.zeros(1000, dtype=np.int32)
    plain = len(numbers.encode([values], [context])[0])
    values[500] = 90
    assert len(numbers.encode([values], [context])[0]) <= plain + 2  # the escape's symbol


def test_certain_zeros_take_the_state_alone() -> None:
    (data,) = numbers.encode([np.zeros(8000, dtype=np.int32)], [np.zeros(8000, dtype=np.uint16)])
    assert data == (1 << 16).to_bytes(4, "little")
    assert numbers.encode([np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.uint16)]) == [b""]
