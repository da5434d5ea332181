"""The choice of code tables: against known scales, against every constant choice, and for weights of all kinds."""

import numpy as np
import pytest

from mpq.coding.code_fit import fit
from mpq.coding.code_tables import MAGNITUDES, SCALES, SHAPES, UNIT, code_tables, table


def none(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns exponents that are all 0."""
    return tuple(np.zeros(count, dtype=np.int16) for count in codes.shape)


def total(codes: np.ndarray, tables: np.ndarray) -> float:
    """Returns the bits of codes in tables of their own."""
    return float(code_tables().lengths()[tables, np.minimum(np.abs(codes), MAGNITUDES - 1).reshape(-1)].sum()) / UNIT


def test_the_scales_that_codes_were_drawn_by_are_found() -> None:
    random = np.random.default_rng(0)
    rows, columns = random.integers(-6, 7, 200), random.integers(10, 23, 300)
    std = 2.0 ** ((rows[:, None] + columns) / 4 - 4)
    for shape, unit in ((1, random.laplace(0, 0.5**0.5, std.shape)), (4, random.normal(0, 1, std.shape))):
        codes = np.rint(unit * std).astype(np.int32)
        found = fit(codes, *none(codes))
        assert found.shape == shape
        scales = found.rows[:, None] + found.columns
        assert np.abs(scales - rows[:, None] - columns).max() <= 2
        assert np.mean(scales == rows[:, None] + columns) > 0.5
        truth = np.asarray(table(shape, rows[:, None] + columns)).reshape(-1)
        assert total(codes, found.tables()) < 1.001 * total(codes, truth)


def test_steps_say_what_to_expect() -> None:
    """Columns with fewer codes than would tell their scale follow their exponents."""
    random = np.random.default_rng(1)
    exponents = random.integers(-8, 9, 400)
    codes = np.rint(random.normal(0, 2.0 ** (-exponents / 4), (8, 400))).astype(np.int32)
    blind, told = fit(codes, *none(codes)), fit(codes, np.zeros(8, dtype=int), exponents)
    same = [np.bincount(one.columns + exponents + 99).max() for one in (blind, told)]  # the commonest difference
    assert same[1] > 2 * same[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 5), (64, 64)])
def test_no_single_table_is_better(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    codes = np.rint(random.laplace(0, 2, shape)).astype(np.int32)
    best = min(
        total(codes, np.full(codes.size, int(table(i, scale)))) for i in range(len(SHAPES)) for scale in range(SCALES)
    )
    found = fit(codes, *none(codes))
    assert found.tables().shape == (codes.size,)
    assert total(codes, found.tables()) <= best + 8


def test_all_zero_and_outliers() -> None:
    codes = np.zeros((5, 6), dtype=np.int32)
    assert len(np.unique(fit(codes, *none(codes)).tables())) == 1
    codes[2, 3] = 2**24
    assert fit(codes, *none(codes)).tables().max() <= len(SHAPES) * SCALES
