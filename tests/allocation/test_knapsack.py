"""The best choice of one option per decision against brute force and SciPy's MILP."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knapsacks import OPTIONS, Options, by_brute_force, by_milp, random_options, totals

from mpq.allocation.knapsack import smallest_cost
from mpq.errors import MpqError


@settings(max_examples=400, deadline=None)
@given(OPTIONS, st.integers(0, 150))
def test_one_budget_equals_brute_force(options: Options, budget: int) -> None:
    expected = by_brute_force(options, budget)
    if expected is None:
        with pytest.raises(MpqError, match="smallest"):
            smallest_cost(options, budget)
        return
    cost, size = totals(options, smallest_cost(options, budget))
    assert size <= budget
    assert cost == pytest.approx(expected[0], rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
@pytest.mark.parametrize(
    "kind, layers",
    [
        ("falling", 60),
        ("random", 60),
        ("repeated", 60),
        pytest.param("proportional", 7, marks=pytest.mark.slow),
    ],  # the last: 10 s
)
def test_one_budget_equals_milp(kind: str, layers: int, share: float) -> None:
    for seed in range(3):
        options = random_options(seed, layers, 6, kind)
        smallest, largest = (sum(pick(size for size, _ in row) for row in options) for pick in (min, max))
        budget = smallest + int(share * (largest - smallest))
        cost, size = totals(options, smallest_cost(options, budget))
        assert size <= budget
        assert cost == pytest.approx(by_milp(options, budget, cost), rel=1e-7)


@pytest.mark.parametrize(
    "options, words",
    [
        ([[]], "decision 0: expected at least one option, got none"),
        ([[(1, 0.0)], [(1, float("nan"))]], "decision 1: expected finite costs, got .*nan"),
        ([[(2, 0.0)], [(3, 0.0), (4, 0.0)]], "budget: expected at least 5, the sum of the smallest options, got 4"),
    ],
)
def test_what_cannot_be_solved(options: Options, words: str) -> None:
    with pytest.raises(MpqError, match=words):
        smallest_cost(options, 4)


def test_no_decision_is_no_choice() -> None:
    assert smallest_cost([], 0) == []
