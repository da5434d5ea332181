"""An allocation whose effect is measured, and made better by moves that are measured too.

The audio is that of the sensitivities and two parts that they have not seen. On one of them the moves are decided
(`mpq.allocation.moves`); the verdict comes from the other, which has decided nothing: the divergence of the answer, and
of some sizes of the frontier (`mpq.allocation.meter`).

Measured moves are kept in a journal beside the result (their time too), so a run that was killed resumes.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mpq.allocation.decisions import FREE, Constraints, Decision, list_decisions
from mpq.allocation.meter import Meter, Point, measuring, rounded_weights
from mpq.allocation.moves import Effort, refine
from mpq.allocation.records import Allocation
from mpq.allocation.solve import Budget, one_budget, rounded_up, size_range, solve
from mpq.artifact.file import check_names
from mpq.artifact.parts import fold_as_stored
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.files import check_output, digest
from mpq.journal import Journal
from mpq.loading import OpenedModel, model_files, open_float_model
from mpq.models.base import AsrModel
from mpq.runtime import choose_device, memory_for
from mpq.sensitivity.calibration import BATCH_SECONDS, HELD_OUT_SECONDS, CalibrationData, further, redraw
from mpq.sensitivity.divergence import BOUND
from mpq.sensitivity.records import SensitivityTable
from mpq.sensitivity.statistics import input_statistics


def allocate_measured(
    table: SensitivityTable,
    checkpoint: Path,
    out: Path,
    budgets: Mapping[str, float | None],
    constraints: Constraints = FREE,
    *,
    whole_frontier: bool = False,
    points: int = 5,
    effort: Effort | None = None,
    held_out_seconds: float = HELD_OUT_SECONDS,
    data: Path | None = None,
    device: str = "auto",
    quiet: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Allocation:
    """Solves the allocation, measures it and some sizes of the frontier, refines it if asked to, and writes `out`.

    Args:
        table: The sensitivities; their model and data have to be at hand.
        checkpoint: The float model that they were measured on.
        out: The `mpq.allocation/1` file to write.
        budgets: One of `mpq.allocation.solve.allocate`'s, such as {"target_mb": 7.5}; others may be there as None. Here
            {"max_divergence": F} bounds the measured divergence; the smallest file that keeps it is sought by halving.
        constraints: The demands on single layers.
        whole_frontier: As in `mpq.allocation.solve.allocate`.
        points: Sizes, evenly spaced over the frontier, that are measured besides the answer.
        effort: The effort of the search for better moves; None: there is no search.
        held_out_seconds: Audio for the verdict, and as much at most that decides on moves.
        data: The place of the data now; None: where the table says.
        device: As in `mpq.runtime.choose_device`.
        quiet: Show no progress.
        clock: Returns the time in seconds.

    Raises:
        MpqError: Bad input of any kind, other data than the table's, or no audio besides what the table has seen.
    """
    budget = one_budget(budgets)
    _check_options(points, effort, budget)
    check_output(out, *model_files(checkpoint), data)
    problem = _Problem(table, constraints, tuple(list_decisions(table, constraints)), budget, whole_frontier)
    answers = [problem.first()]
    opened = open_float_model(checkpoint, choose_device(device), "measure with")
    _check_model(opened, table)
    fold_as_stored(opened.model, WeightFormat.from_json(table.quantizer))
    audio = _Audio.drawn(opened.model, table, data, held_out_seconds, is_deciding=effort is not None)
    work = [opened.sha256, audio.deciding.sha256, table.to_json(), answers[0].to_json()]
    journal = Journal(out.with_name(out.name + ".journal"), digest(work))
    with memory_for(f"{audio.seen.path}: batches of {BATCH_SECONDS:g} s"):
        weights = _rounded(opened, table, audio.seen, quiet)
        if effort:
            journal.begin()
            with measuring(opened.model, audio.deciding) as joint:
                meter = Meter(joint, weights, journal, clock)
                answers.append(_refined(problem, answers[0], meter, audio.deciding, effort, quiet))
        with measuring(opened.model, audio.fresh) as joint:
            allocation = _judged(problem, answers, Meter(joint, weights), audio.fresh, points)
    allocation.save(out)
    if effort:
        journal.remove()
    return allocation


def _check_options(points: int, effort: Effort | None, budget: Budget) -> None:
    limit = budget.value if budget.name == "max_divergence" else None
    if points < 0:
        raise MpqError(f"--points: expected 0 or more, got {points}")
    if effort and not (math.isfinite(effort.seconds) and effort.seconds > 0):
        raise MpqError(f"--minutes: expected a number above 0, got {effort.seconds / 60:g}")
    if limit is not None and limit >= BOUND:
        raise MpqError(f"max_divergence: what is measured is below {BOUND:g} nat whatever is done, got {limit:g}")
    if limit is not None and effort:
        raise MpqError("moves keep a size: expected a size as the budget to refine under, got max_divergence")


def _check_model(opened: OpenedModel, table: SensitivityTable) -> None:
    """Raises MpqError unless the table is that of the model."""
    if table.model.get("sha256", opened.sha256) != opened.sha256:
        raise MpqError(f"{opened.path}: the sensitivities are those of another checkpoint, {table.model.get('path')}")
    check_names(opened.model.weights(), dict.fromkeys((layer.name for layer in table.layers), 0))


def _rounded(
    opened: OpenedModel, table: SensitivityTable, seen: CalibrationData, quiet: bool
) -> dict[str, dict[float, Tensor]]:
    """Returns all weights at all widths of the table, as `rounded_weights`."""
    weight_format = WeightFormat.from_json(table.quantizer)
    grams = input_statistics(opened.model, opened.sha256, seen, weight_format, quiet)
    return rounded_weights(opened.model, weight_format, table.bits, grams, quiet)


@dataclass(frozen=True)
class _Problem:
    """A problem that is solved for one size after the other.

    Attributes:
        table: The sensitivities.
        constraints: The demands on single layers.
        decisions: The decisions that follow from both.
        budget: The budget that was asked for.
        whole_frontier: As in `mpq.allocation.solve.allocate`; it is that of the final answer.
    """

    table: SensitivityTable
    constraints: Constraints
    decisions: tuple[Decision, ...]
    budget: Budget
    whole_frontier: bool

    @property
    def limit(self) -> float | None:
        """The divergence that the answer may have when measured; None where the budget is one of size."""
        return self.budget.value if self.budget.name == "max_divergence" else None

    def first(self) -> Allocation:
        """Returns the answer by the table alone; the largest file where the budget is one of divergence."""
        if self.limit is not None:
            return self.answer(size_range(self.table, self.decisions)[1])
        return solve(self.table, self.budget, self.constraints, self.whole_frontier)

    def sizes(self, points: int) -> list[int]:
        """Returns sizes that are evenly spaced from the smallest file to the largest."""
        smallest, largest = size_range(self.table, self.decisions)
        return [smallest + (largest - smallest) * step // max(points - 1, 1) for step in range(points)]

    def answer(self, target_bytes: int, whole_frontier: bool = False) -> Allocation:
        """Returns the allocation for a size."""
        return solve(self.table, Budget("target_bytes", target_bytes), self.constraints, whole_frontier)


@dataclass(frozen=True)
class _Audio:
    """The parts of the data.

    Attributes:
        seen: The part that the sensitivities have seen.
        deciding: The part that decides on moves; `seen` where nothing is decided.
        fresh: The part that has decided nothing.
    """

    seen: CalibrationData
    deciding: CalibrationData
    fresh: CalibrationData

    @classmethod
    def drawn(
        cls, model: AsrModel, table: SensitivityTable, data: Path | None, held_out_seconds: float, is_deciding: bool
    ) -> "_Audio":
        """Returns the parts of the table's data, which now are in `data` if that is given."""
        seen = redraw(model, table.data, data)
        left = sum(seen.rest_durations)
        deciding = further(model, seen, min(held_out_seconds, left / 2)) if is_deciding and seen.rest else seen
        fresh = further(model, deciding, held_out_seconds)
        if not fresh.utterances or (is_deciding and len(deciding.utterances) < 2):
            raise MpqError(
                f"{seen.path}: no audio is left to measure on (to refine takes 3 utterances): "
                f"{sum(seen.durations):.0f} s were used for the sensitivities, {left:.0f} s are left; measure the "
                "sensitivities on less (--seconds), or on a part of more data"
            )
        return cls(seen, deciding, fresh)


def _refined(
    problem: _Problem, start: Allocation, meter: Meter, deciding: CalibrationData, effort: Effort, quiet: bool
) -> Allocation:
    """Returns the allocation after moves that the meter decides on; its `refinement` tells of both."""
    average_bits = problem.budget.decimal if problem.budget.name == "average_bits" else None
    refined, refinement = refine(meter, problem.table, problem.decisions, start, average_bits, effort, quiet)
    audio = {"max_seconds": deciding.max_seconds, "seconds": deciding.seconds}
    return replace(refined, refinement=refinement | audio)


def _judged(
    problem: _Problem, answers: Sequence[Allocation], meter: Meter, fresh: CalibrationData, points: int
) -> Allocation:
    """Returns the final answer with the measurements of it, of the answers before it and of some sizes.

    Args:
        problem: The problem.
        answers: The answer by the table, and after it the refined one if there is one. Under a limit of divergence the
            final answer is searched for instead.
        meter: Measures on `fresh`.
        fresh: The audio that has decided nothing.
        points: The number of sizes.
    """
    measured = [meter.point(problem.answer(size)) for size in problem.sizes(points)]
    if problem.limit is not None:
        smallest, tried = _smallest_within(problem.limit, problem, meter)
        answers, measured = [smallest], measured + tried
    verdicts = [meter.point(answer) for answer in answers]
    before = {"measured_before": verdicts[0][2]} if len(answers) > 1 else {}
    return replace(
        answers[-1],
        measured=tuple(sorted({*measured, *verdicts})),
        measured_kl=verdicts[-1][2],
        measured_seconds=fresh.seconds,
        refinement=answers[-1].refinement | before,
    )


def _smallest_within(limit: float, problem: _Problem, meter: Meter) -> tuple[Allocation, list[Point]]:
    """Returns the smallest allocation found whose measured divergence is at most `limit`, and all measurements.

    Sizes are halved until they agree to a thousandth; the measured divergence need not fall at every step of the
    frontier, so a smaller size that keeps the limit may exist.
    """
    smallest, largest = size_range(problem.table, problem.decisions)
    best = problem.answer(largest)
    tried = [meter.point(best)]
    if tried[0][2] > limit:
        raise MpqError(
            f"max_divergence {limit:g} is less than what was measured with the least sensitive widths: "
            f"{rounded_up(tried[0][2])} nats per frame; measure wider ones"
        )
    low, high = smallest - 1, best.predicted_bytes
    while high - low > largest // 1000:
        candidate = problem.answer((low + high) // 2)
        tried.append(meter.point(candidate))
        if tried[-1][2] <= limit:
            best, high = candidate, candidate.predicted_bytes
        else:
            low = (low + high) // 2
    if problem.whole_frontier:
        return problem.answer(best.predicted_bytes, whole_frontier=True), tried
    return replace(best, target_bytes=best.predicted_bytes), tried
