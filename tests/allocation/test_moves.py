"""Which moves are looked at first, and which fit a budget; what they do to a model is in test_refine.py."""

from fractions import Fraction

import pytest

from mpq.allocation.decisions import Decision
from mpq.allocation.moves import Limits, promising

DECISIONS = (
    Decision((0,), (2, 4, 8), (20, 40, 80), (9.0, 3.0, 1.0), (80, 160, 320)),
    Decision((1,), (2, 4, 8), (10, 12, 14), (1.0, 0.5, 0.25), (8, 16, 32)),
    Decision((2,), (16,), (50,), (0.0,), (400,)),
)


def test_the_most_promising_raises_and_cuts() -> None:
    """By hand: for a byte, a raise of 0 saves 2/40 and one of 1 saves 0.5/2."""
    assert promising(DECISIONS, [1, 0, 0], 5) == [(1, 1), (0, 1), (0, -1)]
    assert promising(DECISIONS, [1, 0, 0], 1) == [(1, 1), (0, -1)]
    assert promising(DECISIONS, [2, 2, 0], 5) == [(0, -1), (1, -1)]  # for a byte 2/40 and 0.25/2
    assert promising(DECISIONS, [0, 0, 0], 5) == [(0, 1), (1, 1)]
    assert promising(DECISIONS[2:], [0], 5) == []


@pytest.mark.parametrize(
    "size, codes, fits", [(102, None, True), (101, None, False), (102, 576, True), (102, 575, False), (101, 576, False)]
)
def test_choices_fit_the_bytes_and_the_bits(size: int, codes: int | None, fits: bool) -> None:
    """Sizes 40 + 12 + 50, code bits 160 + 16 + 400."""
    limits = Limits(size, None if codes is None else Fraction(codes))
    assert limits.admit(DECISIONS, [1, 1, 0]) is fits
