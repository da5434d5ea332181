"""Descriptions of vectors: bytes, predictors, and the choice between them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.coding.code_tables import SCALES, UNIT
from mpq.coding.vectors import EXPONENTS, ORIGIN, PREVIOUS, ZERO, Description, describe
from mpq.errors import MpqError

vectors = st.lists(st.tuples(st.integers(-300, 300), st.integers(-40, 40)), max_size=30)


@given(vectors)
def test_there_and_back(pairs: list[tuple[int, int]]) -> None:
    numbers, exponents = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in range(2))
    chosen, length = describe(numbers, exponents)
    for one in (chosen, *(Description(predictor, 3, -128) for predictor in (ZERO, ORIGIN, PREVIOUS, EXPONENTS))):
        residuals = one.residuals(numbers, exponents)
        assert one.numbers(residuals, exponents).tolist() == numbers.tolist()
    data = chosen.to_bytes()
    assert Description.from_bytes(data + b"more") == (chosen, len(data))
    assert length >= 8 * UNIT * len(data)


def test_zeros_are_one_zero_byte() -> None:
    for count in (0, 1, 500):
        chosen, length = describe(np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64))
        assert chosen.to_bytes() == b"\0" and length == 8 * UNIT


def test_each_predictor_is_chosen_where_it_fits() -> None:
    random = np.random.default_rng(0)
    noise, exponents = random.integers(-1, 2, 300), random.integers(-15, 16, 300)
    for numbers, expected in [
        (noise, Description(ZERO)),
        (noise + 20, Description(ORIGIN, origin=20)),
        (np.full(300, 7), Description(ORIGIN, origin=7)),
        (np.cumsum(noise), Description(PREVIOUS)),
        (12 - exponents + noise, Description(EXPONENTS, origin=12)),
    ]:
        chosen, _ = describe(numbers, exponents)
        assert (chosen.predictor, chosen.origin) == (expected.predictor, expected.origin)
        assert (chosen.scale is None) == (numbers is not noise and len(set(numbers)) == 1)


def test_an_origin_out_of_reach_is_left_to_the_residuals() -> None:
    chosen, _ = describe(np.full(3, 5000), np.zeros(3, dtype=np.int64))
    assert chosen.numbers(chosen.residuals(np.full(3, 5000), np.zeros(3)), np.zeros(3)).tolist() == [5000] * 3


@pytest.mark.parametrize("data", [b"", bytes([ORIGIN << 6]), bytes([SCALES + 1]), bytes([63])])
def test_damage(data: bytes) -> None:
    with pytest.raises(MpqError, match="expected the"):
        Description.from_bytes(data)
