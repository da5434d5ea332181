"""Random allocation problems, and their answers by brute force and by SciPy's mixed-integer solver."""

import itertools
import math

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

Options = list[list[tuple[int, float]]]

COST = st.one_of(st.sampled_from([0.0, 1.0, 1e-9]), st.floats(0, 10), st.floats(-1, 1), st.floats(0, 1e-6))
OPTIONS = st.lists(st.lists(st.tuples(st.integers(0, 40), COST), min_size=1, max_size=4), min_size=1, max_size=5)
"""Problems that are small enough for brute force."""


def by_brute_force(options: Options, budget: int) -> tuple[float, int] | None:
    """Returns the smallest (cost, size) within the budget, from all choices."""
    choices = itertools.product(*options)
    sums = ((math.fsum(cost for _, cost in choice), sum(size for size, _ in choice)) for choice in choices)
    return min((pair for pair in sums if pair[1] <= budget), default=None)


def by_milp(options: Options, budget: int, about: float) -> float:
    """Returns the smallest sum of KL within the budget, from SciPy's mixed-integer solver (HiGHS).

    HiGHS stops within 1e-6 of the optimum, so the sum is scaled to about 1000.
    """
    sizes = np.array([size for row in options for size, _ in row], dtype=float)
    kls = np.array([kl for row in options for _, kl in row])
    one_each = np.zeros((len(options), sizes.size))
    start = 0
    for index, row in enumerate(options):
        one_each[index, start : start + len(row)] = 1
        start += len(row)
    scale = 1000 / max(about, 1e-30)
    solution = milp(
        kls * scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, -np.inf, budget)],
        integrality=np.ones(sizes.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert solution.status == 0, solution.message
    chosen = np.flatnonzero(solution.x > 0.5)
    assert len(chosen) == len(options)
    return math.fsum(kls[chosen])


def totals(options: Options, choices: list[int]) -> tuple[float, int]:
    picked = [row[choice] for row, choice in zip(options, choices, strict=True)]
    return math.fsum(kl for _, kl in picked), sum(size for size, _ in picked)


def random_options(seed: int, layers: int, widths: int, kind: str) -> Options:
    """Returns an instance; sizes are ugly (no common divisor), KLs fall with bits unless `kind` says otherwise."""
    random = np.random.default_rng(seed)
    numel = random.integers(1_000, 3_000_000, layers)
    if kind == "repeated":
        numel = random.choice(numel[:6], layers)
    options = []
    for count in numel:
        sizes = [int(count * bits // 8 + random.integers(0, 97)) for bits in range(1, widths + 1)]
        kls = 10 ** random.uniform(-6, 0) * 4.0 ** -np.arange(widths) * np.exp(random.normal(0, 0.5, widths))
        if kind == "random":
            kls = 10 ** random.uniform(-9, 2, widths)
        if kind == "proportional":  # KL falls in proportion to size: the bounds of a solver tell nothing
            kls = (max(sizes) - np.array(sizes)) / 1e6 + random.integers(0, 3, widths) * 1e-6
        options.append(list(zip(sizes, map(float, kls), strict=True)))
    return options
