"""The bit-width of every layer under a size: the least sum of divergences, exactly (Li et al. 2023, Eq. 8).

The sizes are true bytes: those of each layer in the packed file at each width, scales and zero points included, and
those of the fixed rest of the file. So an answer that fits here fits on the device, to the byte; `average_bits` bounds
the nominal size of the paper (weights times bits). `mpq.allocation.knapsack` has the mathematics; this module turns a
sensitivity table, floors, exclusions and ties into its decisions, and the answer into an `Allocation`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from mpq.allocation.decisions import FREE, Constraints, Decision, list_decisions
from mpq.allocation.frontier import WHOLE, Frontier, pareto_frontier
from mpq.allocation.knapsack import Options, smallest_cost
from mpq.allocation.records import Allocation
from mpq.errors import MpqError
from mpq.sensitivity.records import SensitivityTable

MB = 2**20
MOST_POINTS = 20_000
"""Points of a frontier that are written as they are; of more, those that keep the KL to THINNING."""
THINNING = 1e-3
"""The most that thinning adds to the smallest KL of a size, as a fraction of it."""
QUICK = 10_000_000
"""Pairs that the dynamic programme may look at for a frontier that nobody asked to be whole: 0.1 to 0.4 s."""


def allocate(
    table: SensitivityTable,
    *,
    target_bytes: int | None = None,
    target_mb: float | None = None,
    target_ratio: float | None = None,
    average_bits: float | None = None,
    max_divergence: float | None = None,
    keep: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    tie: Sequence[str] = (),
    whole_frontier: bool = False,
) -> Allocation:
    """Returns the bit-widths with the smallest sum of divergences under one budget, and the frontier around them.

    Of several with the same sum the one with the fewest bytes is taken. Patterns are globs on layer names
    (case-sensitive); one that matches nothing is an error.

    Args:
        table: Sizes and divergences of every layer.
        target_bytes: Upper bound of the packed file's size.
        target_mb: The same in MB of 2^20 bytes.
        target_ratio: The bound is the size with every layer at 32 bits (and the fixed bytes) divided by this.
        average_bits: Upper bound of sum(numel * bits) / sum(numel): codes alone. The target of the answer is then its
            own size, and the frontier leaves out points that are smaller and better but above the average.
        max_divergence: Upper bound of the sum of divergences, nats per frame; the smallest file that keeps it is the
            answer, and its size the target.
        keep: {pattern: bits}: at least so many bits.
        exclude: Patterns of layers that are left unquantized: they take their `float_bytes` and cost no divergence.
        tie: Patterns; layers that match one, with the same text in place of each `*`, share one bit-width, in addition
            to the groups of the table.
        whole_frontier: List the whole frontier also if that takes seconds, not only if it takes a fraction of one.

    Raises:
        MpqError: Not exactly one budget, or one that is not a positive number or smaller than what can be reached
            (the message says the smallest); a pattern that matches nothing or contradicts another.
    """
    budgets = {"target_bytes": target_bytes, "target_mb": target_mb, "target_ratio": target_ratio}
    budgets |= {"average_bits": average_bits, "max_divergence": max_divergence}
    return solve(table, one_budget(budgets), Constraints(keep or {}, exclude, tie), whole_frontier)


@dataclass(frozen=True)
class Budget:
    """The bound that an answer keeps.

    Attributes:
        name: "target_bytes", "target_mb", "target_ratio", "average_bits" or "max_divergence", as in `allocate`.
        value: The bound, above 0.
    """

    name: str
    value: float

    @property
    def decimal(self) -> Fraction:
        """The decimal number that was asked for: 3.3 admits an average of exactly 33/10."""
        return Fraction(str(self.value))


def one_budget(budgets: Mapping[str, float | None]) -> Budget:
    """Returns the one budget that is given, out of {name: value or None}.

    Raises:
        MpqError: Not exactly one is given, or it is not a positive number.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise MpqError(f"expected one of {', '.join(budgets)} as the target, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
        raise MpqError(f"{name}: expected a positive number, got {value!r}")
    return Budget(name, value)


def solve(
    table: SensitivityTable,
    budget: Budget,
    constraints: Constraints = FREE,
    whole_frontier: bool = False,
) -> Allocation:
    """Returns the answer that `allocate` describes."""
    decisions = list_decisions(table, constraints)
    by_bytes = [list(zip(decision.size_bytes, decision.cost, strict=True)) for decision in decisions]
    choices, target = _best(table, decisions, by_bytes, budget)
    predicted_bytes, predicted_kl = totals(table, decisions, choices)
    assert predicted_bytes <= target, "the solver kept to its budget"
    frontier = pareto_frontier(by_bytes, WHOLE if whole_frontier else QUICK)
    points, thinned = with_answer(_points(frontier, table.fixed_bytes), predicted_bytes, predicted_kl, target)
    note = f"; thinned to a KL within {THINNING:.1%} at every size" if thinned else ""
    bits = chosen_bits(table, decisions, choices)
    return Allocation(
        bits=bits,
        target_bytes=target,
        predicted_bytes=predicted_bytes,
        predicted_kl=predicted_kl,
        average_bits=weighted_average(table, bits),
        frontier=tuple(points),
        frontier_note=_described(frontier) + note,
        quantizer=table.quantizer,
        model=table.model,
        data=table.data,
        output=table.output,
        fingerprint=table.fingerprint,
    )


def _best(
    table: SensitivityTable, decisions: Sequence[Decision], by_bytes: Sequence[Options], budget: Budget
) -> tuple[list[int], int]:
    """Returns the choices of least divergence within the budget, and the target in bytes."""
    if budget.name == "average_bits":
        choices = _under_average(table, decisions, budget.decimal)
        return choices, totals(table, decisions, choices)[0]
    if budget.name == "max_divergence":
        choices = _under_divergence(by_bytes, float(budget.value))
        return choices, totals(table, decisions, choices)[0]
    smallest, largest = size_range(table, decisions)
    full = table.fixed_bytes + 4 * sum(layer.numel for layer in table.layers)
    value = budget.decimal
    target = math.floor({"target_bytes": value, "target_mb": value * MB, "target_ratio": full / value}[budget.name])
    if target < smallest:
        raise MpqError(
            f"{budget.name} {float(value):g} is {target} bytes, less than the smallest possible: {smallest} bytes "
            f"({math.ceil(smallest / MB * 1e4) / 1e4:.4f} MB, ratio {math.floor(full / smallest * 1e4) / 1e4:.4f})"
        )
    return smallest_cost(by_bytes, min(target, largest) - table.fixed_bytes), target


def size_range(table: SensitivityTable, decisions: Sequence[Decision]) -> tuple[int, int]:
    """Returns the bytes of the smallest and of the largest file that the decisions allow."""
    smallest = sum(min(decision.size_bytes) for decision in decisions)
    return table.fixed_bytes + smallest, table.fixed_bytes + sum(max(decision.size_bytes) for decision in decisions)


def _under_average(table: SensitivityTable, decisions: Sequence[Decision], average_bits: Fraction) -> list[int]:
    """Returns the best choices under an average width; of equal sums of divergences, the one with the fewest bytes."""
    numel = sum(layer.numel for layer in table.layers)
    budget = math.floor(average_bits * numel)
    smallest = sum(min(decision.code_bits) for decision in decisions)
    if budget < smallest:
        smallest_bytes, _ = size_range(table, decisions)
        raise MpqError(
            f"average_bits {float(average_bits):g} is less than the smallest possible: "
            f"{math.ceil(Fraction(smallest, numel) * 10_000) / 1e4:g}; no file is smaller than {smallest_bytes} bytes "
            f"({math.ceil(smallest_bytes / MB * 1e4) / 1e4:.4f} MB)"
        )
    by_codes = [list(zip(decision.code_bits, decision.cost, strict=True)) for decision in decisions]
    budget = min(budget, sum(max(decision.code_bits) for decision in decisions))
    return smallest_cost(by_codes, budget, [decision.size_bytes for decision in decisions])


def _under_divergence(options: Sequence[Options], limit: float) -> list[int]:
    """Returns the choices with the fewest bytes whose sum of divergences is at most `limit`."""

    def divergence(choices: Sequence[int]) -> float:
        return math.fsum(pairs[choice][1] for pairs, choice in zip(options, choices, strict=True))

    # the smallest divergence falls with the budget, so the smallest budget that is enough is found by halving
    low = sum(min(size for size, _ in pairs) for pairs in options) - 1
    high = sum(max(size for size, _ in pairs) for pairs in options)
    best = smallest_cost(options, high)
    if divergence(best) > limit:
        raise MpqError(
            f"max_divergence {limit:g} is less than the smallest possible with these widths: "
            f"{rounded_up(divergence(best))} nats per frame; measure wider ones"
        )
    while high - low > 1:
        middle = (low + high) // 2
        choices = smallest_cost(options, middle)
        if divergence(choices) <= limit:
            best, high = choices, middle
        else:
            low = middle
    return best


def rounded_up(value: float) -> str:
    """Returns a number in four digits that is not below the value, so that an error can offer it as a new limit."""
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{float(math.ceil(Fraction(value) * Fraction(10) ** digits) / Fraction(10) ** digits):.4g}"


def _described(frontier: Frontier) -> str:
    """Returns how complete the frontier is."""
    if frontier.is_whole:
        return "every trade-off between size and KL"
    return "too many trade-offs to list all: those on the lower convex hull, each the smallest KL of its size"


def totals(table: SensitivityTable, decisions: Sequence[Decision], choices: Sequence[int]) -> tuple[int, float]:
    """Returns the file's bytes and the sum of divergences of a choice."""
    pairs = list(zip(decisions, choices, strict=True))
    size = table.fixed_bytes + sum(decision.size_bytes[choice] for decision, choice in pairs)
    return size, math.fsum(decision.cost[choice] for decision, choice in pairs)


def chosen_bits(table: SensitivityTable, decisions: Sequence[Decision], choices: Sequence[int]) -> dict[str, float]:
    """Returns {layer name: bits} of a choice, in the table's order."""
    pairs = zip(decisions, choices, strict=True)
    bits = {index: decision.bits[choice] for decision, choice in pairs for index in decision.layers}
    return {layer.name: bits[index] for index, layer in enumerate(table.layers)}


def weighted_average(table: SensitivityTable, bits: Mapping[str, float]) -> float:
    """Returns the code bits per weight."""
    return sum(bits[layer.name] * layer.numel for layer in table.layers) / sum(layer.numel for layer in table.layers)


def _points(frontier: Frontier, fixed_bytes: int) -> list[tuple[int, float]]:
    """Returns the frontier's points as (bytes of the file, divergence)."""
    return [(int(size) + fixed_bytes, float(kl)) for size, kl in zip(frontier.size_bytes, frontier.cost, strict=True)]


def with_answer(
    points: Sequence[tuple[int, float]], size: int, kl: float, target: int
) -> tuple[list[tuple[int, float]], bool]:
    """Returns the frontier with the answer as its last point at or below the target; whether points were left out.

    The frontier's own point there differs from the answer by rounding alone, and gives way to it; under a bound on
    average bits, so do points that are no larger and better but above that bound.
    """
    falling: list[tuple[int, float]] = []
    for point in sorted(point for point in points if point[0] < size and point[1] > kl):
        if not falling or point[1] < falling[-1][1]:
            falling.append(point)
    above: list[tuple[int, float]] = []
    for point in sorted(point for point in points if point[0] > target and point[1] < kl):
        if not above or point[1] < above[-1][1]:
            above.append(point)
    if len(falling) + len(above) < MOST_POINTS:
        return [*falling, (size, kl), *above], False
    return [*_thinned(falling), (size, kl), *_thinned(above)], True


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns points such that the last one at or below any size has at most (1 + THINNING) times the smallest KL."""
    kept: list[tuple[int, float]] = []
    for point in points:
        if not kept or point[1] * (1 + THINNING) < kept[-1][1] or point is points[-1]:
            kept.append(point)
    return kept
