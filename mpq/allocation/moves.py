"""Moves that make an allocation better: one decision gets one width more, another one less, within the same budget.

In each round the raises and cuts that the sensitivities find most promising are measured one by one, pairs are tried in
the order of the sum of their two measurements, and a pair is kept only if the measured divergence of the whole
model falls by more than chance (Student's test over the utterances): on little audio most falls are chance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from scipy import stats
from torch import Tensor

from mpq.allocation.decisions import Decision
from mpq.allocation.meter import Meter
from mpq.allocation.records import Allocation
from mpq.allocation.solve import chosen_bits, totals, weighted_average, with_answer
from mpq.progress import progress
from mpq.sensitivity.records import SensitivityTable

Move = tuple[int, int]
"""(decision, +1 or -1): one width more or less."""


@dataclass(frozen=True)
class Effort:
    """The effort of a search for moves.

    Attributes:
        seconds: The time that measurements may take.
        most_promising: Raises, and cuts, that are measured one by one in a round.
        tries: Pairs in a row that may fail before a round ends.
        confidence: The level of Student's one-sided test that a move's effect has to pass. The pairs tried are those
            whose parts measured best on the same audio, so more pass by chance than the level says; the audio of the
            verdict shows it.
    """

    seconds: float = 600.0
    most_promising: int = 24
    tries: int = 12
    confidence: float = 0.975


@dataclass(frozen=True)
class Limits:
    """The bounds of a choice.

    Attributes:
        size_bytes: The bytes of all layers.
        code_bits: The bits of all codes; None if only the bytes matter.
    """

    size_bytes: int
    code_bits: Fraction | None

    def admit(self, decisions: Sequence[Decision], choices: Sequence[int]) -> bool:
        pairs = list(zip(decisions, choices, strict=True))
        if sum(decision.size_bytes[choice] for decision, choice in pairs) > self.size_bytes:
            return False
        code_bits = sum(decision.code_bits[choice] for decision, choice in pairs)
        return self.code_bits is None or code_bits <= self.code_bits


def refine(
    meter: Meter,
    table: SensitivityTable,
    decisions: Sequence[Decision],
    start: Allocation,
    average_bits: Fraction | None,
    effort: Effort,
    quiet: bool,
) -> tuple[Allocation, dict[str, Any]]:
    """Returns the allocation after the moves that were kept, and {"moves", "measurements", "before", "after"}.

    The size stays within the start's target, and the code bits within `average_bits` if that is what was asked for.
    """
    numel = sum(layer.numel for layer in table.layers)
    limits = Limits(start.target_bytes - table.fixed_bytes, None if average_bits is None else average_bits * numel)
    choices = [one.bits.index(start.bits[table.layers[one.layers[0]].name]) for one in decisions]
    with progress("refining", effort.seconds, quiet, "s") as advance:
        search = _Search(meter, table, decisions, choices, limits, effort, advance)
        while search.improve():
            pass
    size, kl = totals(table, decisions, search.choices)
    frontier, _ = with_answer(start.frontier, size, kl, start.target_bytes)
    widths = search.bits()
    refined = replace(
        start,
        bits=widths,
        predicted_bytes=size,
        predicted_kl=kl,
        average_bits=weighted_average(table, widths),
        frontier=tuple(frontier),
        frontier_note=start.frontier_note + ("; moves made the answer leave it" if search.moves else ""),
    )
    return refined, {
        "moves": search.moves,
        "measurements": len(meter.known),
        "before": meter.per_frame(search.first),
        "after": meter.per_frame(search.current),
    }


class _Search:
    """The rounds of `refine`.

    Attributes:
        choices: The option of each decision now.
        first, current: (utterances,) measured divergences of the first choices and of those now.
        moves: The number of moves that were kept.
    """

    def __init__(
        self,
        meter: Meter,
        table: SensitivityTable,
        decisions: Sequence[Decision],
        choices: list[int],
        limits: Limits,
        effort: Effort,
        on_seconds: Callable[[float], None],
    ) -> None:
        self.meter, self.table, self.decisions, self.choices = meter, table, decisions, choices
        self.limits, self.effort, self.on_seconds = limits, effort, on_seconds
        self.shown, self.moves = 0.0, 0
        meter.move_to(self.bits())
        self.first = self.current = meter.kl(self.bits())
        self.quantile = float(stats.t.ppf(effort.confidence, len(self.first) - 1))

    def moved(self, *moves: Move) -> list[int]:
        """Returns the choices after some moves."""
        result = list(self.choices)
        for index, step in moves:
            result[index] += step
        return result

    def bits(self, *moves: Move) -> dict[str, float]:
        """Returns {layer name: bits} after some moves."""
        return chosen_bits(self.table, self.decisions, self.moved(*moves))

    def effect(self, *moves: Move) -> Tensor | None:
        """Returns the change of each utterance's divergence by some moves; None when the time is over."""
        widths = self.bits(*moves)
        if self.meter.seconds >= self.effort.seconds and not self.meter.is_known(widths):
            return None
        result = self.meter.kl(widths) - self.current
        seconds = min(self.meter.seconds, self.effort.seconds)
        self.on_seconds(seconds - self.shown)
        self.shown = seconds
        return result

    def is_sure(self, effect: Tensor) -> bool:
        """Returns whether the divergence falls by more than chance."""
        return float(effect.sum()) < -self.quantile * float(effect.std()) * math.sqrt(len(effect))

    def singles(self) -> dict[Move, float]:
        """Returns the measured effect of each of the most promising moves, as far as the time goes."""
        found: dict[Move, float] = {}
        for move in promising(self.decisions, self.choices, self.effort.most_promising):
            effect = self.effect(move)
            if effect is None:
                break
            found[move] = float(effect.sum())
        return found

    def improve(self) -> bool:
        """Goes one round, and returns whether it kept a move. No decision moves twice in a round."""
        singles = self.singles()

        def expected(moves: tuple[Move, ...]) -> float:
            return sum(singles[move] for move in moves)

        raises = [move for move in singles if move[1] > 0]
        cuts = [move for move in singles if move[1] < 0]
        candidates: list[tuple[Move, ...]] = [(move,) for move in singles]
        candidates += [(up, down) for up in raises for down in cuts if up[0] != down[0]]
        touched: set[int] = set()
        failures = 0
        for moves in sorted(candidates, key=expected):
            if failures == self.effort.tries or expected(moves) >= 0:
                break
            if touched & {index for index, _ in moves} or not self.limits.admit(self.decisions, self.moved(*moves)):
                continue
            effect = self.effect(*moves)
            if effect is None:
                break
            if not self.is_sure(effect):
                failures += 1
                continue
            self.choices, self.current = self.moved(*moves), self.current + effect
            self.meter.move_to(self.bits())
            touched |= {index for index, _ in moves}
            self.moves, failures = self.moves + 1, 0
        return bool(touched)


def promising(decisions: Sequence[Decision], choices: Sequence[int], most: int) -> list[Move]:
    """Returns the raises that the table promises most of for a byte, then the cuts that cost least; `most` of each."""
    raises: list[tuple[float, int, int]] = []
    cuts: list[tuple[float, int, int]] = []
    for index, (decision, choice) in enumerate(zip(decisions, choices, strict=True)):
        for step, found in ((1, raises), (-1, cuts)):
            if 0 <= choice + step < len(decision.bits):
                cost = decision.cost[choice + step] - decision.cost[choice]
                size = abs(decision.size_bytes[choice + step] - decision.size_bytes[choice])
                found.append((cost / max(size, 1), index, step))
    return [(index, step) for found in (raises, cuts) for _, index, step in sorted(found)[:most]]
