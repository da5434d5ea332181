"""The cheapest choice of one option per decision whose sizes fit a budget, exactly: the mathematics.

A decision (one layer, or several that are tied) offers options (bit-widths), each with a size in bytes and a cost (its
divergence). Both add up over the decisions: Li et al. 2023, Eq. 8 minimises sum_i D_i(n_i) subject to a size.

Why carrying only undominated pairs is exact: let two partial choices cover the same decisions, A neither larger nor
dearer than B. Whatever completes B completes A, neither larger nor dearer. So B can go, and carrying only the
undominated (size, cost) pairs from decision to decision loses nothing (`mpq.allocation.frontier` carries them all).

One budget needs far fewer pairs. Replace the options of the decisions not yet covered by their lower convex hull and
allow mixtures: the best completion is then a sorted list of steps, steepest first, cut off at the budget (Dantzig's
bound). A pair whose bound is no better than a complete choice in hand (any pair, completed by whole steps) goes.
Decisions are covered in order of how little it costs to leave the relaxed optimum (the core of Pisinger 1995), in two
halves that are searched for the best match (Horowitz and Sahni 1974), so that sizes chosen to defeat the bound cost a
square root of what they would. Nothing goes that could win. Measured for 200 decisions of 8 options: mostly 50 to
5,000 pairs, 10 to 100 ms; 0.01 to 0.4 s when the cost is linear in size and the bound says nothing; minutes (3 million
pairs, where HiGHS does not finish) when it is linear but for a fixed gain per step: the problem is NP-hard.

Rounding: costs are added as float64 excess over the decision's smallest, never subtracted again, so that small terms
survive beside large ones. Totals that agree to TIE (12 digits) are equal, and the smaller size wins.

Dimensions: S pairs of a part, K corners of a relaxation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpq.errors import MpqError

Integers = NDArray[np.integer]
Floats = NDArray[np.float64]

TIE = 1e-12
"""Relative difference between totals of cost below which they are equal."""

MAX_PAIRS = 20_000_000
"""Undominated pairs of one half in `smallest_cost`: about 1 GB. The hardest instance found had 3 million."""

TIE_PAIRS = 500_000
"""Undominated pairs of one half in `smallest_cost` above which it stops looking for the smallest of equal optima."""

BEAM = 2_000
"""Pairs that `smallest_cost` carries when it looks for a first good choice of a hard instance."""

Options = Sequence[tuple[int, float]]
"""The options of one decision: (size, cost), in any order, in units of the caller's choice."""


class Alternatives(NamedTuple):
    """The undominated options of one decision, ascending in size, strictly falling in cost."""

    place: Integers  # (options,) in the caller's list
    size: Integers  # (options,) above the smallest
    cost: Floats  # (options,) above the smallest
    tie: Integers  # (options,) the number that decides between equal costs


def undominated(size: Integers, cost: Integers | Floats, tie: Integers | None = None) -> Integers:
    """Returns the rows (in order of size) that no other row beats; with `tie`, less of it wins between equal costs."""
    if tie is not None:
        order = np.lexsort((tie, cost))
        changes = (np.diff(cost[order]) != 0) | (np.diff(tie[order]) != 0)
        cost = np.empty(len(order), np.int64)
        cost[order] = np.concatenate([[0], np.cumsum(changes)])[: len(order)]
    order = np.argsort(size, kind="stable")
    ranked = cost[order]
    falls = np.ones(len(order), bool)
    falls[1:] = ranked[1:] < np.minimum.accumulate(ranked)[:-1]
    order = order[falls]
    last_of_size = np.ones(len(order), bool)
    last_of_size[:-1] = np.diff(size[order]) > 0
    return order[last_of_size]


def list_alternatives(options: Sequence[Options], ties: Sequence[Sequence[int]] | None = None) -> list[Alternatives]:
    """Returns the undominated options of each decision.

    Raises:
        MpqError: A decision has no option, or a cost is not finite.
    """
    decisions = []
    for row, pairs in enumerate(options):
        if not len(pairs):
            raise MpqError(f"decision {row}: expected at least one option, got none")
        size = np.array([size for size, _ in pairs], np.int64)
        cost = np.array([cost for _, cost in pairs], np.float64)
        if not np.isfinite(cost).all():
            raise MpqError(f"decision {row}: expected finite costs, got {cost.tolist()}")
        tie = size if ties is None else np.array(ties[row], np.int64)
        place = undominated(size, cost, None if ties is None else tie)
        decisions.append(Alternatives(place, size[place] - size.min(), cost[place] - cost.min(), tie[place]))
    return decisions


class Steps(NamedTuple):
    """The edges of every decision's lower convex hull, steepest first (within a decision: in order of size)."""

    slope: Floats  # (steps,) cost saved for each unit of size
    decision: Integers
    option: Integers  # that the step leads to
    size: Integers  # added
    cost: Floats  # saved, > 0
    tie: Integers  # added


def _hull_steps(decisions: Sequence[Alternatives]) -> Steps:
    steps: list[tuple[float, int, int, int, float, int]] = []
    for row, (_, size, cost, tie) in enumerate(decisions):
        hull: list[tuple[float, int, int, int, float, int]] = []
        for option in range(1, len(size)):
            while True:
                start = hull[-1][2] if hull else 0
                saved, added = cost[start] - cost[option], size[option] - size[start]
                if not hull or saved / added < hull[-1][0]:
                    break
                hull.pop()
            hull.append((saved / added, row, option, added, saved, tie[option] - tie[start]))
        steps += hull
    steps.sort(key=lambda step: -step[0])  # stable
    columns: list[tuple[float, ...]] = list(zip(*steps, strict=True)) or [()] * 6
    return Steps(
        slope=np.array(columns[0], np.float64),
        decision=np.array(columns[1], np.int64),
        option=np.array(columns[2], np.int64),
        size=np.array(columns[3], np.int64),
        cost=np.array(columns[4], np.float64),
        tie=np.array(columns[5], np.int64),
    )


class Part:
    """The undominated choices over some of the decisions, and how each came about.

    Attributes:
        size, cost, tie: (S,) sums over the part's decisions; size ascending, cost strictly falling.
        trail: For each decision of the part: its number, the option (S,) and the row before it was added (S,).
    """

    def __init__(self) -> None:
        self.size: Integers = np.zeros(1, np.int64)
        self.cost: Floats = np.zeros(1)
        self.tie: Integers = np.zeros(1, np.int64)
        self.trail: list[tuple[int, Integers, Integers]] = []

    def shift(self, row: int, option: int, decision: Alternatives) -> None:
        """Adds a decision of which one option is left."""
        count = len(self.size)
        self.size, self.cost = self.size + decision.size[option], self.cost + decision.cost[option]
        self.tie = self.tie + decision.tie[option]
        self.trail.append((row, np.broadcast_to(option, count), np.arange(count)))

    def choices(self, row: int, into: list[int]) -> None:
        """Writes the options of a row's choice into a list with an entry for each decision."""
        for decision, option, parent in reversed(self.trail):
            into[decision] = int(option[row])
            row = int(parent[row])


class Relaxation:
    """The best mixtures of options over some decisions: a convex curve, whose corners are choices of whole options.

    Attributes:
        size, cost, tie: (K,) sums at the corners; the first has every decision at its smallest size.
    """

    def __init__(self, steps: Steps, decisions: Sequence[Alternatives], covers: NDArray[np.bool_]) -> None:
        self.steps, self.rows = steps, np.flatnonzero(covers[steps.decision])
        covered = [decision for decision, is_covered in zip(decisions, covers, strict=True) if is_covered]
        self.smallest_tie = sum(int(decision.tie.min()) for decision in covered)
        first_tie = sum(int(decision.tie[0]) for decision in covered)
        self.size = np.concatenate([[0], np.cumsum(steps.size[self.rows])])
        self.tie = first_tie + np.concatenate([[0], np.cumsum(steps.tie[self.rows])])
        # From the end, so that small sums are not left over from large ones.
        self.cost = np.concatenate([np.cumsum(steps.cost[self.rows][::-1])[::-1], [0.0]])
        self.slope = np.concatenate([[0.0], steps.slope[self.rows]])  # of the edge that ends in the corner

    @classmethod
    def of_all(cls, decisions: Sequence[Alternatives]) -> "Relaxation":
        """Returns the relaxation of all decisions."""
        return cls(_hull_steps(decisions), decisions, np.ones(len(decisions), np.bool_))

    def bound(self, room: Integers) -> Floats:
        """Returns the least cost of any completion of a size up to `room`; infinity where there is none."""
        corner = np.minimum(np.searchsorted(self.size, room), len(self.size) - 1)
        bound = self.cost[corner] + self.slope[corner] * np.maximum(self.size[corner] - room, 0)
        return np.asarray(np.where(room < 0, np.inf, bound), np.float64)

    def choices(self, corner: int, into: list[int]) -> None:
        """Writes the options of a corner's choice into a list of the smallest ones, with an entry for each decision."""
        for row in self.rows[:corner]:
            into[self.steps.decision[row]] = int(self.steps.option[row])


class _Search:
    """The search of `smallest_cost`; `room` is the budget less the smallest size of every decision."""

    def __init__(self, decisions: list[Alternatives], room: int, scale: float, has_ties: bool) -> None:
        self.decisions, self.room, self.scale, self.has_ties = decisions, room, scale, has_ties
        self.everything = Relaxation.of_all(decisions)
        self.least = np.inf  # smallest cost found
        self.best_cost, self.best_size, self.best_tie = np.inf, 0, 0
        self.best_choices = [0] * len(decisions)
        self.break_ties = True

    @property
    def tolerance(self) -> float:
        return TIE * self.least + self.scale

    def match(self, a: Part | Relaxation, b: Part | Relaxation, rest: Relaxation | None, corner: int) -> None:
        """Takes the best sum of a row of `a`, a row of `b` and the corner of `rest` if it beats the best so far."""
        room = self.room - (int(rest.size[corner]) if rest else 0)
        row_a = np.arange(len(a.size))
        row_b = np.searchsorted(b.size, room - a.size, side="right") - 1
        self._take(a, b, rest, corner, row_a[row_b >= 0], row_b[row_b >= 0])
        # The last row of b that fits is the best but for rounding: of equal sums, the first is the smallest.
        enough = self.least + self.tolerance - (rest.cost[corner] if rest else 0.0)
        row_b = np.searchsorted(-b.cost, a.cost - enough)
        fits = row_b < len(b.size)
        fits[fits] = a.size[fits] + b.size[row_b[fits]] <= room
        self._take(a, b, rest, corner, row_a[fits], row_b[fits])

    def _take(
        self,
        a: Part | Relaxation,
        b: Part | Relaxation,
        rest: Relaxation | None,
        corner: int,
        row_a: Integers,
        row_b: Integers,
    ) -> None:
        """Takes the best of some pairs of rows, as `match` says."""
        if not len(row_a):
            return
        cost = a.cost[row_a] + b.cost[row_b] + (rest.cost[corner] if rest else 0.0)
        tie = a.tie[row_a] + b.tie[row_b] + (int(rest.tie[corner]) if rest else 0)
        self.least = min(self.least, float(cost.min()))
        equal = np.flatnonzero(cost <= self.least + self.tolerance)
        if not len(equal):
            return
        pick = equal[np.argmin(tie[equal])]
        if tie[pick] >= self.best_tie and self.best_cost <= self.least + self.tolerance:
            return
        self.best_cost, self.best_tie = float(cost[pick]), int(tie[pick])
        choices = [0] * len(self.decisions)
        a.choices(int(row_a[pick]), choices)
        b.choices(int(row_b[pick]), choices)
        if rest:
            rest.choices(corner, choices)
        self.best_choices = choices
        self.best_size = sum(int(self.decisions[row].size[option]) for row, option in enumerate(choices))

    def can_win(self, size: Integers, cost: Floats, tie: Integers, rest: Relaxation) -> NDArray[np.bool_]:
        """Returns which pairs may still lead to a smaller cost, or to the same with less of `tie`."""
        bound = cost + rest.bound(self.room - size)
        smaller = bound < self.least - self.tolerance
        if not self.break_ties:
            return smaller
        if self.has_ties:
            return smaller | ((bound <= self.least + self.tolerance) & (tie + rest.smallest_tie < self.best_tie))
        return smaller | (cost + rest.bound(self.best_size - 1 - size) <= self.least + self.tolerance)

    def add(self, part: Part, row: int, options: Integers, rest: Relaxation, most: int = 0) -> None:
        """Adds decision `row`, with some of its options, to a part; `rest` covers all that is then outside of it."""
        decision, found = self.decisions[row], []
        for option in options:
            size, cost = part.size + decision.size[option], part.cost + decision.cost[option]
            tie = part.tie + decision.tie[option]
            wins = np.flatnonzero(self.can_win(size, cost, tie, rest))
            chosen = np.full(len(wins), option, np.int16)
            found.append((size[wins], cost[wins], tie[wins], chosen, wins.astype(np.int32)))
        size, cost, tie, option, parent = (np.concatenate(column) for column in zip(*found, strict=True))
        keep = undominated(size, cost, tie if self.has_ties else None)
        if most and len(keep) > most:
            best = np.argpartition(cost[keep] + rest.bound(self.room - size[keep]), most)[:most]
            keep = keep[np.sort(best)]
        if len(keep) > TIE_PAIRS and self.break_ties:
            self.break_ties = False
            keep = keep[self.can_win(size[keep], cost[keep], tie[keep], rest)]
        if len(keep) > MAX_PAIRS:
            raise MpqError(f"{len(keep):,} choices are too alike to find the best; tie layers, or give fewer widths")
        part.size, part.cost, part.tie = size[keep], cost[keep], tie[keep]
        part.trail.append((row, option[keep], parent[keep]))

    def guess(self) -> None:
        """Finds a good choice fast: large decisions first, only the BEAM pairs of the best bound, small ones last."""
        part, outside = Part(), np.ones(len(self.decisions), bool)
        for row in sorted(range(len(self.decisions)), key=lambda row: -self.decisions[row].size[-1]):
            outside[row] = False
            rest = Relaxation(self.everything.steps, self.decisions, outside)
            self.add(part, row, np.arange(len(self.decisions[row].size)), rest, BEAM)
            if not len(part.size):
                return
            self.match(rest, part, None, 0)

    def run(self) -> list[int]:
        """Returns the best option of each decision."""
        count = len(self.decisions)
        everything = self.everything
        lower = float(everything.bound(np.array([self.room]))[0])
        cut = np.searchsorted(everything.size, self.room)
        slope = everything.slope[cut] if cut < len(everything.slope) else 0.0
        # Leaving the relaxed optimum for an option costs at least `extra` (Lagrange, at the slope of the cut).
        priced = [decision.cost + slope * decision.size for decision in self.decisions]
        extra = [price - price.min() for price in priced]
        rounding = 1e-13 * max(float(price.max()) for price in priced)
        next_extra = np.array([np.partition(costs, 1)[1] if len(costs) > 1 else np.inf for costs in extra])
        order = np.argsort(next_extra, kind="stable")

        halves = (Part(), Part())
        outside = [np.ones(count, bool), np.ones(count, bool)]  # of each half
        rests = [everything, everything]
        empty, guessed = Part(), False
        self.match(everything, empty, None, 0)
        for row in order.tolist():
            limit = self.least + self.tolerance + rounding + TIE * lower - lower
            if next_extra[row] > limit:
                break  # so are all that follow: none leaves the relaxed optimum
            small = 0 if len(halves[0].size) <= len(halves[1].size) else 1
            outside[small][row] = False
            rests[small] = Relaxation(self.everything.steps, self.decisions, outside[small])
            self.add(halves[small], row, np.flatnonzero(extra[row] <= limit), rests[small])
            if len(halves[small].size) > BEAM and not guessed:
                guessed = True
                self.guess()
            if not len(halves[small].size):
                return self.best_choices
            self.match(rests[small], halves[small], None, 0)
            rest = Relaxation(self.everything.steps, self.decisions, outside[0] & outside[1])
            middle = int(np.searchsorted(rest.rows, cut))
            for corner in range(max(middle - 4, 0), min(middle + 5, len(rest.size))):
                self.match(*halves, rest, corner)
        # The decisions that are left keep their option of the relaxed optimum.
        for row in np.flatnonzero(outside[0] & outside[1]).tolist():
            halves[0].shift(row, int(extra[row].argmin()), self.decisions[row])
        self.match(*halves, None, 0)
        return self.best_choices


def smallest_cost(options: Sequence[Options], budget: int, ties: Sequence[Sequence[int]] | None = None) -> list[int]:
    """Returns the option of each decision such that the sizes sum to at most `budget` and the costs to the least.

    It is the optimum, not an approximation: see the module's text, with Li et al. 2023, Eq. 8 as the problem.

    Args:
        options: The options (size, cost) of each decision. Sizes are whole numbers of any unit.
        budget: The largest sum of sizes, in the same unit.
        ties: A number for each option; of choices with the least sum of costs, the one with the smallest sum of these
            numbers is taken. None: the sizes. Beyond TIE_PAIRS pairs (costs exactly linear in size, seen with `ties`
            alone) the cost is still the least, but the tie may go to either.

    Raises:
        MpqError: The smallest options are above the budget, a decision has no option, a cost is not finite, or more
            than MAX_PAIRS pairs are left.

    >>> smallest_cost([[(2, 0.5), (4, 0.1)], [(3, 0.9), (6, 0.0)]], budget=8)
    [0, 1]
    """
    decisions = list_alternatives(options, ties)
    smallest = sum(min(size for size, _ in pairs) for pairs in options)
    if smallest > budget:
        raise MpqError(f"budget: expected at least {smallest}, the sum of the smallest options, got {budget}")
    scale = sum(abs(min(cost for _, cost in pairs)) for pairs in options) * 2.0**-51
    unit = max(int(np.gcd.reduce(np.concatenate([decision.size for decision in decisions]))), 1) if decisions else 1
    decisions = [decision._replace(size=decision.size // unit) for decision in decisions]
    search = _Search(decisions, (budget - smallest) // unit, scale, has_ties=ties is not None)
    choices = search.run() if decisions else []
    return [int(decision.place[option]) for decision, option in zip(decisions, choices, strict=True)]
