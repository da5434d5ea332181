"""Every trade-off between size and cost against brute force, and against the best choice for one size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from knapsacks import OPTIONS, Options, by_brute_force, random_options, totals

from mpq.allocation.frontier import pareto_frontier
from mpq.allocation.knapsack import smallest_cost


@settings(max_examples=300, deadline=None)
@given(OPTIONS)
def test_frontier_equals_brute_force(options: Options) -> None:
    frontier = pareto_frontier(options)
    assert frontier.is_whole
    got = list(zip(frontier.size_bytes.tolist(), frontier.cost.tolist(), strict=True))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(got))
    for size in range(got[0][0], sum(max(s for s, _ in row) for row in options) + 1):
        best = by_brute_force(options, size)
        assert best is not None
        last = [cost for point, cost in got if point <= size][-1]
        assert last == pytest.approx(best[0], rel=1e-9, abs=1e-12)
    for point, (size, cost) in enumerate(got):
        assert totals(options, frontier.choices(point)) == (pytest.approx(cost, rel=1e-9, abs=1e-12), size)


@pytest.mark.parametrize("kind", ["falling", "random", "repeated"])
def test_large_instances_are_consistent(kind: str) -> None:
    """200 layers x 8 widths: every point of the frontier is the optimum of its own size, and none is beaten."""
    options = random_options(1, 200, 8, kind)
    frontier = pareto_frontier(options)
    assert (np.diff(frontier.size_bytes) > 0).all() and (np.diff(frontier.cost) < 0).all()
    for point in np.linspace(0, len(frontier.cost) - 1, 7).astype(int):
        size, cost = int(frontier.size_bytes[point]), float(frontier.cost[point])
        assert totals(options, frontier.choices(int(point))) == (pytest.approx(cost, rel=1e-9), size)
        assert totals(options, smallest_cost(options, size))[0] == pytest.approx(cost, rel=1e-9)
