"""Every trade-off between size and cost: the choices that no other choice beats in both.

Li et al. 2023 take the Pareto frontier of sums over the layers from ZeroQ (Cai et al. 2020). The dynamic programme adds
decision after decision and carries the undominated (size, cost) pairs, which loses nothing (`mpq.allocation.knapsack`
says why). Its work is the number of pairs, at worst exponential, in practice 10^4 to 10^6 after 200 decisions: seconds,
for the whole frontier.

Dimensions: P points of a frontier.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.allocation.knapsack import (
    Alternatives,
    Floats,
    Integers,
    Options,
    Part,
    Relaxation,
    list_alternatives,
    undominated,
)

WHOLE = 200_000_000
"""Pairs that `pareto_frontier` looks at before it gives up the whole frontier: about 5 s and 0.5 GB."""


@dataclass(frozen=True)
class Frontier:
    """Trade-offs between size and cost, each the smallest cost that its size allows.

    Attributes:
        size_bytes: (P,) ascending.
        cost: (P,) strictly falling, in the unit of the options' costs.
        is_whole: Every trade-off is there; else those on the lower convex hull, all that a price per byte can find.
        choices: Maps a point's number to the option of each decision.
    """

    size_bytes: Integers
    cost: Floats
    is_whole: bool
    choices: Callable[[int], list[int]]


def pareto_frontier(options: Sequence[Options], max_pairs: int = WHOLE) -> Frontier:
    """Returns all sums of (size, cost) that no other choice beats; where they are too many, those on the convex hull.

    A point of the hull minimises cost + price * size for some price per byte, so it too is the smallest cost that its
    size allows. Neighbours on it differ in one decision, so that whatever is left out between them saves fewer bytes
    than that one decision's step.

    Args:
        options: For each decision its options, (size in bytes, cost).
        max_pairs: Give up the whole frontier when the dynamic programme has to look at more pairs than this; 0: hull.

    Raises:
        MpqError: A decision has no option or a cost is not finite.

    >>> frontier = pareto_frontier([[(2, 0.5), (4, 0.25)], [(3, 1.0), (6, 0.0)]])
    >>> [(int(size), float(cost)) for size, cost in zip(frontier.size_bytes, frontier.cost)]
    [(5, 1.5), (7, 1.25), (8, 0.5), (10, 0.25)]
    >>> frontier.choices(2)
    [0, 1]
    """
    decisions = list_alternatives(options)
    part = _every_pair(decisions, max_pairs)
    curve = part or Relaxation.of_all(decisions)
    cost = curve.cost + math.fsum(min(cost for _, cost in pairs) for pairs in options)
    falls = np.ones(len(cost), bool)
    falls[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
    rows = np.flatnonzero(falls)

    def choices(point: int) -> list[int]:
        chosen = [0] * len(decisions)
        curve.choices(int(rows[point]), chosen)
        return [int(decision.place[option]) for decision, option in zip(decisions, chosen, strict=True)]

    smallest = sum(min(size for size, _ in pairs) for pairs in options)
    return Frontier(curve.size[rows] + smallest, cost[rows], part is not None, choices)


def _every_pair(decisions: Sequence[Alternatives], max_pairs: int) -> Part | None:
    """Returns all undominated choices; None where that takes more than `max_pairs` pairs."""
    part, pairs = Part(), 0
    for row in sorted(range(len(decisions)), key=lambda row: decisions[row].size[-1]):
        decision = decisions[row]
        pairs += len(part.size) * len(decision.size)
        if pairs > max_pairs:
            return None
        size = (decision.size[:, None] + part.size).ravel()
        cost = (decision.cost[:, None] + part.cost).ravel()
        keep = undominated(size, cost)
        option, parent = np.divmod(keep, len(part.size))
        part.trail.append((row, option.astype(np.int16), parent.astype(np.int32)))
        part.size, part.cost = size[keep], cost[keep]
    return part
