"""The cheapest choice of one option per decision, and every trade-off between size and KL: the mathematics.

A decision (one layer, or several that are tied) offers options (bit-widths), each with a size in bytes and a KL
divergence. Both add up over the decisions: Li et al. 2023, Eq. 8 minimises sum_i D_i(n_i) subject to a size, and takes
the Pareto frontier of such sums (what no other choice beats in size and KL at once) from ZeroQ (Cai et al. 2020).

Why the dynamic programme is exact: let two partial choices cover the same decisions, A neither larger nor worse than
B. Whatever completes B completes A, neither larger nor worse. So B can go, and carrying only the undominated (size,
kl) pairs from decision to decision loses nothing. Its cost is the number of pairs, at worst exponential, in practice
10^4 to 10^6 after 200 decisions: seconds, for the whole frontier.

One budget needs far fewer pairs. Replace the options of the decisions not yet covered by their lower convex hull and
allow mixtures: the best completion is then a sorted list of steps, steepest first, cut off at the budget (Dantzig's
bound). A pair whose bound is no better than a complete choice in hand (any pair, completed by whole steps) goes.
Decisions are covered in order of how little it costs to leave the relaxed optimum (the core of Pisinger 1995), in two
halves that are searched for the best match (Horowitz and Sahni 1974), so that sizes chosen to defeat the bound cost a
square root of what they would. Nothing goes that could win. Measured for 200 decisions of 8 options: mostly 50 to
5,000 pairs, 10 to 100 ms; 0.01 to 0.4 s when KL is linear in size and the bound says nothing; minutes (3 million
pairs, where HiGHS does not finish) when it is linear but for a fixed gain per step: the problem is NP-hard.

Rounding: KLs are added as float64 excess over the decision's smallest, never subtracted again, so that small terms
survive beside large ones. Totals that agree to TIE (12 digits) are equal, and the smaller size wins.

Dimensions: S pairs of a part, K corners of a relaxation, P points of a frontier.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpq.errors import MpqError

WHOLE = 200_000_000
"""Pairs that `pareto_frontier` looks at before it gives up the whole frontier: about 5 s and 0.5 GB."""

TIE = 1e-12
"""Relative difference between totals of KL below which they are equal."""

MAX_PAIRS = 20_000_000
"""Undominated pairs of one half in `smallest_kl`: about 1 GB. The hardest instance found had 3 million."""

TIE_PAIRS = 500_000
"""Undominated pairs of one half in `smallest_kl` above which it stops looking for the smallest of equal optima."""

BEAM = 2_000
"""Pairs that `smallest_kl` carries when it looks for a first good choice of a hard instance."""

Options = Sequence[tuple[int, float]]
"""The options of one decision: (size in bytes, KL in nats), in any order."""


class _Decision(NamedTuple):
    """The undominated options of one decision, ascending in size, strictly falling in KL."""

    index: np.ndarray  # (options,) into the caller's list
    size: np.ndarray  # (options,) above the smallest
    kl: np.ndarray  # (options,) above the smallest
    tie: np.ndarray  # (options,) what decides between equal KLs


def _undominated(size: np.ndarray, kl: np.ndarray, tie: np.ndarray | None = None) -> np.ndarray:
    """Returns the rows (in order of size) that no other row beats; with `tie`, less of it wins between equal KLs."""
    if tie is not None:
        order = np.lexsort((tie, kl))
        changes = (np.diff(kl[order]) != 0) | (np.diff(tie[order]) != 0)
        kl = np.empty(len(order), np.int64)
        kl[order] = np.concatenate([[0], np.cumsum(changes)])[: len(order)]
    order = np.argsort(size, kind="stable")
    ranked = kl[order]
    falls = np.ones(len(order), bool)
    falls[1:] = ranked[1:] < np.minimum.accumulate(ranked)[:-1]
    order = order[falls]
    last_of_size = np.ones(len(order), bool)
    last_of_size[:-1] = np.diff(size[order]) > 0
    return order[last_of_size]


def _decisions(options: Sequence[Options], ties: Sequence[Sequence[int]] | None = None) -> list[_Decision]:
    decisions = []
    for row, pairs in enumerate(options):
        if not len(pairs):
            raise MpqError(f"decision {row}: expected at least one option, got none")
        size = np.array([size for size, _ in pairs], np.int64)
        kl = np.array([kl for _, kl in pairs], np.float64)
        if not np.isfinite(kl).all():
            raise MpqError(f"decision {row}: expected finite KLs, got {kl.tolist()}")
        tie = size if ties is None else np.array(ties[row], np.int64)
        index = _undominated(size, kl, None if ties is None else tie)
        decisions.append(_Decision(index, size[index] - size.min(), kl[index] - kl.min(), tie[index]))
    return decisions


class _Steps(NamedTuple):
    """The edges of every decision's lower convex hull, steepest first (within a decision: in order of size)."""

    slope: np.ndarray  # (steps,) KL saved per byte
    decision: np.ndarray
    option: np.ndarray  # that the step leads to
    size: np.ndarray
    kl: np.ndarray  # saved, > 0
    tie: np.ndarray


def _hull_steps(decisions: Sequence[_Decision]) -> _Steps:
    steps: list[tuple[float, int, int, int, float, int]] = []
    for row, (_, size, kl, tie) in enumerate(decisions):
        hull: list[tuple[float, int, int, int, float, int]] = []
        for option in range(1, len(size)):
            while True:
                start = hull[-1][2] if hull else 0
                saved, added = kl[start] - kl[option], size[option] - size[start]
                if not hull or saved / added < hull[-1][0]:
                    break
                hull.pop()
            hull.append((saved / added, row, option, added, saved, tie[option] - tie[start]))
        steps += hull
    steps.sort(key=lambda step: -step[0])  # stable
    columns = list(zip(*steps, strict=True)) or [()] * 6
    types = (np.float64, np.int64, np.int64, np.int64, np.float64, np.int64)
    return _Steps(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


class _Part:
    """The undominated choices over some of the decisions, and how each came about.

    Attributes:
        size, kl, tie: (S,) sums over the part's decisions; size ascending, kl strictly falling.
        trail: For each decision of the part: its number, the option (S,) and the row before it was added (S,).
    """

    def __init__(self) -> None:
        self.size, self.kl, self.tie = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)
        self.trail: list[tuple[int, np.ndarray, np.ndarray]] = []

    def shift(self, row: int, option: int, decision: _Decision) -> None:
        """Adds a decision of which one option is left."""
        count = len(self.size)
        self.size, self.kl = self.size + decision.size[option], self.kl + decision.kl[option]
        self.tie = self.tie + decision.tie[option]
        self.trail.append((row, np.broadcast_to(option, count), np.arange(count)))

    def choices(self, row: int, into: list[int]) -> None:
        for decision, option, parent in reversed(self.trail):
            into[decision] = int(option[row])
            row = int(parent[row])


class _Relaxation:
    """The best mixtures of options over some decisions: a convex curve, whose corners are choices of whole options.

    Attributes:
        size, kl, tie: (K,) sums at the corners; the first has every decision at its smallest size.
    """

    def __init__(self, steps: _Steps, decisions: Sequence[_Decision], covers: np.ndarray) -> None:
        self.steps, self.rows = steps, np.flatnonzero(covers[steps.decision])
        self.smallest_tie = sum(int(decisions[row].tie.min()) for row in np.flatnonzero(covers))
        first_tie = sum(int(decisions[row].tie[0]) for row in np.flatnonzero(covers))
        self.size = np.concatenate([[0], np.cumsum(steps.size[self.rows])])
        self.tie = first_tie + np.concatenate([[0], np.cumsum(steps.tie[self.rows])])
        # From the end, so that small sums are not left over from large ones.
        self.kl = np.concatenate([np.cumsum(steps.kl[self.rows][::-1])[::-1], [0.0]])
        self.slope = np.concatenate([[0.0], steps.slope[self.rows]])  # of the edge that ends in the corner

    def bound(self, room: np.ndarray) -> np.ndarray:
        """Returns the least KL of any completion within `room` bytes; infinity where there is none."""
        corner = np.minimum(np.searchsorted(self.size, room), len(self.size) - 1)
        bound = self.kl[corner] + self.slope[corner] * np.maximum(self.size[corner] - room, 0)
        return np.where(room < 0, np.inf, bound)

    def choices(self, corner: int, into: list[int]) -> None:
        for row in self.rows[:corner]:
            into[self.steps.decision[row]] = int(self.steps.option[row])


class _Search:
    """The search of `smallest_kl`; `room` is the budget less the smallest size of every decision."""

    def __init__(self, decisions: list[_Decision], room: int, scale: float, has_ties: bool) -> None:
        self.decisions, self.room, self.scale, self.has_ties = decisions, room, scale, has_ties
        self.steps = _hull_steps(decisions)
        self.least = np.inf  # smallest KL found
        self.best_kl, self.best_size, self.best_tie = np.inf, 0, 0
        self.best_choices = [0] * len(decisions)
        self.break_ties = True

    @property
    def tolerance(self) -> float:
        return TIE * self.least + self.scale

    def match(self, a: _Part | _Relaxation, b: _Part | _Relaxation, rest: _Relaxation | None, corner: int) -> None:
        """Takes the best sum of a row of `a`, a row of `b` and the corner of `rest` if it beats the best so far."""
        room = self.room - (int(rest.size[corner]) if rest else 0)
        row_a = np.arange(len(a.size))
        row_b = np.searchsorted(b.size, room - a.size, side="right") - 1
        self._take(a, b, rest, corner, row_a[row_b >= 0], row_b[row_b >= 0])
        # The last row of b that fits is the best but for rounding: of equal sums, the first is the smallest.
        enough = self.least + self.tolerance - (rest.kl[corner] if rest else 0.0)
        row_b = np.searchsorted(-b.kl, a.kl - enough)
        fits = row_b < len(b.size)
        fits[fits] = a.size[fits] + b.size[row_b[fits]] <= room
        self._take(a, b, rest, corner, row_a[fits], row_b[fits])

    def _take(self, a, b, rest, corner, row_a: np.ndarray, row_b: np.ndarray) -> None:
        if not len(row_a):
            return
        kl = a.kl[row_a] + b.kl[row_b] + (rest.kl[corner] if rest else 0.0)
        tie = a.tie[row_a] + b.tie[row_b] + (int(rest.tie[corner]) if rest else 0)
        self.least = min(self.least, float(kl.min()))
        equal = np.flatnonzero(kl <= self.least + self.tolerance)
        if not len(equal):
            return
        pick = equal[np.argmin(tie[equal])]
        if tie[pick] >= self.best_tie and self.best_kl <= self.least + self.tolerance:
            return
        self.best_kl, self.best_tie = float(kl[pick]), int(tie[pick])
        choices = [0] * len(self.decisions)
        a.choices(int(row_a[pick]), choices)
        b.choices(int(row_b[pick]), choices)
        if rest:
            rest.choices(corner, choices)
        self.best_choices = choices
        self.best_size = sum(int(self.decisions[row].size[option]) for row, option in enumerate(choices))

    def can_win(self, size: np.ndarray, kl: np.ndarray, tie: np.ndarray, rest: _Relaxation) -> np.ndarray:
        """Returns which pairs may still lead to a smaller KL, or to the same with less of `tie`."""
        bound = kl + rest.bound(self.room - size)
        smaller = bound < self.least - self.tolerance
        if not self.break_ties:
            return smaller
        if self.has_ties:
            return smaller | ((bound <= self.least + self.tolerance) & (tie + rest.smallest_tie < self.best_tie))
        return smaller | (kl + rest.bound(self.best_size - 1 - size) <= self.least + self.tolerance)

    def add(self, part: _Part, row: int, options: np.ndarray, rest: _Relaxation, most: int = 0) -> None:
        """Adds decision `row`, with some of its options, to a part; `rest` covers all that is then outside of it."""
        decision, found = self.decisions[row], []
        for option in options:
            size, kl = part.size + decision.size[option], part.kl + decision.kl[option]
            tie = part.tie + decision.tie[option]
            keep = np.flatnonzero(self.can_win(size, kl, tie, rest))
            found.append((size[keep], kl[keep], tie[keep], np.full(len(keep), option, np.int16), keep.astype(np.int32)))
        size, kl, tie, option, parent = (np.concatenate(column) for column in zip(*found, strict=True))
        keep = _undominated(size, kl, tie if self.has_ties else None)
        if most and len(keep) > most:
            best = np.argpartition(kl[keep] + rest.bound(self.room - size[keep]), most)[:most]
            keep = keep[np.sort(best)]
        if len(keep) > TIE_PAIRS and self.break_ties:
            self.break_ties = False
            keep = keep[self.can_win(size[keep], kl[keep], tie[keep], rest)]
        if len(keep) > MAX_PAIRS:
            raise MpqError(f"{len(keep):,} choices are too alike to find the best; tie layers, or give fewer widths")
        part.size, part.kl, part.tie = size[keep], kl[keep], tie[keep]
        part.trail.append((row, option[keep], parent[keep]))

    def guess(self) -> None:
        """Finds a good choice fast: large decisions first, only the BEAM pairs of the best bound, small ones last."""
        part, outside = _Part(), np.ones(len(self.decisions), bool)
        for row in sorted(range(len(self.decisions)), key=lambda row: -self.decisions[row].size[-1]):
            outside[row] = False
            rest = _Relaxation(self.steps, self.decisions, outside)
            self.add(part, row, np.arange(len(self.decisions[row].size)), rest, BEAM)
            if not len(part.size):
                return
            self.match(rest, part, None, 0)

    def run(self) -> list[int]:
        count = len(self.decisions)
        everything = _Relaxation(self.steps, self.decisions, np.ones(count, bool))
        lower = float(everything.bound(np.array([self.room]))[0])
        cut = np.searchsorted(everything.size, self.room)
        slope = everything.slope[cut] if cut < len(everything.slope) else 0.0
        # Leaving the relaxed optimum for an option costs at least `extra` (Lagrange, at the slope of the cut).
        priced = [decision.kl + slope * decision.size for decision in self.decisions]
        extra = [price - price.min() for price in priced]
        rounding = 1e-13 * max(float(price.max()) for price in priced)
        next_extra = np.array([np.partition(costs, 1)[1] if len(costs) > 1 else np.inf for costs in extra])
        order = np.argsort(next_extra, kind="stable")

        halves = (_Part(), _Part())
        outside = [np.ones(count, bool), np.ones(count, bool)]  # of each half
        rests = [everything, everything]
        empty, guessed = _Part(), False
        self.match(everything, empty, None, 0)
        for row in order:
            limit = self.least + self.tolerance + rounding + TIE * lower - lower
            if next_extra[row] > limit:
                break  # so are all that follow: none leaves the relaxed optimum
            small = 0 if len(halves[0].size) <= len(halves[1].size) else 1
            outside[small][row] = False
            rests[small] = _Relaxation(self.steps, self.decisions, outside[small])
            self.add(halves[small], row, np.flatnonzero(extra[row] <= limit), rests[small])
            if len(halves[small].size) > BEAM and not guessed:
                guessed = True
                self.guess()
            if not len(halves[small].size):
                return self.best_choices
            self.match(rests[small], halves[small], None, 0)
            rest = _Relaxation(self.steps, self.decisions, outside[0] & outside[1])
            middle = int(np.searchsorted(rest.rows, cut))
            for corner in range(max(middle - 4, 0), min(middle + 5, len(rest.size))):
                self.match(*halves, rest, corner)
        # The decisions that are left keep their option of the relaxed optimum.
        for row in np.flatnonzero(outside[0] & outside[1]):
            halves[0].shift(row, int(extra[row].argmin()), self.decisions[row])
        self.match(*halves, None, 0)
        return self.best_choices


def smallest_kl(options: Sequence[Options], budget: int, ties: Sequence[Sequence[int]] | None = None) -> list[int]:
    """Returns the option of each decision whose sizes sum to at most `budget` with the smallest sum of KL.

    It is the optimum, not an approximation: see the module's text, with Li et al. 2023, Eq. 8 as the problem.

    Args:
        options: For each decision its options, (size, KL in nats). Sizes are whole numbers of any unit.
        budget: In the same unit.
        ties: For each option what decides between equal sums of KL, the smaller sum first; None: the size. Beyond
            TIE_PAIRS pairs (KL exactly linear in size, seen with `ties` alone) the KL is still the smallest, but the
            tie may go to either.

    Raises:
        MpqError: The smallest options are above the budget, a decision has no option, a KL is not finite, or more
            than MAX_PAIRS pairs are left.

    >>> smallest_kl([[(2, 0.5), (4, 0.1)], [(3, 0.9), (6, 0.0)]], budget=8)
    [0, 1]
    """
    decisions = _decisions(options, ties)
    smallest = sum(min(size for size, _ in pairs) for pairs in options)
    if smallest > budget:
        raise MpqError(f"budget: expected at least {smallest}, the sum of the smallest options, got {budget}")
    scale = sum(abs(min(kl for _, kl in pairs)) for pairs in options) * 2.0**-51
    unit = max(int(np.gcd.reduce(np.concatenate([decision.size for decision in decisions]))), 1) if decisions else 1
    decisions = [decision._replace(size=decision.size // unit) for decision in decisions]
    search = _Search(decisions, (budget - smallest) // unit, scale, has_ties=ties is not None)
    choices = search.run() if decisions else []
    return [int(decision.index[option]) for decision, option in zip(decisions, choices, strict=True)]


@dataclass(frozen=True)
class Frontier:
    """Trade-offs between size and KL, each the smallest KL that its size allows.

    Attributes:
        size_bytes: (P,) ascending.
        kl: (P,) strictly falling, nats.
        is_whole: Every trade-off is there; else those on the lower convex hull, all that a price per byte can find.
        choices: Maps a point's number to the option of each decision.
    """

    size_bytes: np.ndarray
    kl: np.ndarray
    is_whole: bool
    choices: Callable[[int], list[int]]


def pareto_frontier(options: Sequence[Options], max_pairs: int = WHOLE) -> Frontier:
    """Returns all sums of (size, KL) that no other choice beats; where they are too many, those on the convex hull.

    A point of the hull minimises KL + price * size for some price per byte, so it too is the smallest KL that its
    size allows. Neighbours on it differ in one decision, so that whatever is left out between them saves fewer bytes
    than that one decision's step.

    Args:
        options: For each decision its options, (size in bytes, KL in nats).
        max_pairs: Give up the whole frontier when the dynamic programme has to look at more pairs than this; 0: hull.

    Raises:
        MpqError: A decision has no option or a KL is not finite.

    >>> frontier = pareto_frontier([[(2, 0.5), (4, 0.25)], [(3, 1.0), (6, 0.0)]])
    >>> [(int(size), float(kl)) for size, kl in zip(frontier.size_bytes, frontier.kl)]
    [(5, 1.5), (7, 1.25), (8, 0.5), (10, 0.25)]
    >>> frontier.choices(2)
    [0, 1]
    """
    decisions = _decisions(options)
    part = _every_pair(decisions, max_pairs)
    curve = part or _Relaxation(_hull_steps(decisions), decisions, np.ones(len(decisions), bool))
    kl = curve.kl + math.fsum(min(kl for _, kl in pairs) for pairs in options)
    falls = np.ones(len(kl), bool)
    falls[1:] = kl[1:] < np.minimum.accumulate(kl)[:-1]
    rows = np.flatnonzero(falls)

    def choices(point: int) -> list[int]:
        chosen = [0] * len(decisions)
        curve.choices(int(rows[point]), chosen)
        return [int(decision.index[option]) for decision, option in zip(decisions, chosen, strict=True)]

    smallest = sum(min(size for size, _ in pairs) for pairs in options)
    return Frontier(curve.size[rows] + smallest, kl[rows], part is not None, choices)


def _every_pair(decisions: Sequence[_Decision], max_pairs: int) -> _Part | None:
    part, pairs = _Part(), 0
    for row in sorted(range(len(decisions)), key=lambda row: decisions[row].size[-1]):
        decision = decisions[row]
        pairs += len(part.size) * len(decision.size)
        if pairs > max_pairs:
            return None
        size = (decision.size[:, None] + part.size).ravel()
        kl = (decision.kl[:, None] + part.kl).ravel()
        keep = _undominated(size, kl)
        option, parent = np.divmod(keep, len(part.size))
        part.trail.append((row, option.astype(np.int16), parent.astype(np.int32)))
        part.size, part.kl = size[keep], kl[keep]
    return part
