"""What an allocation really does to the output, with all layers quantized together, and moves that make it better.

Sums of one-layer divergences leave out what layers do to each other. So the model is quantized as an allocation says
and its divergence measured, on audio that the sensitivities have not seen: for the answer, and for some sizes of the
frontier. What is measured is all that recognition uses, the CTC output and that of the attention decoder where there is
one, whatever output the sensitivities are of.

Refinement looks for moves: one decision gets one width more, another one less, and the size stays within the target.
In each round the raises and cuts that the sensitivities find most promising are measured one by one, pairs are tried in
the order of what their two measurements add up to, and a pair is kept only if the measured divergence of the whole
model falls by more than chance (Student's test over the utterances): on little audio most falls are chance. The verdict
comes from a third part of the audio, which has decided nothing.

Measured moves are kept in a journal beside the result (their time too), so a run that was killed resumes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from mpq.allocation.decisions import Decision, list_decisions
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate, chosen_bits, one_budget, rounded_up, totals, weighted_average, with_answer
from mpq.artifact.file import check_names
from mpq.artifact.weights import WeightFormat, quantize_layer
from mpq.errors import MpqError
from mpq.files import check_output, digest, sha256_file
from mpq.journal import Journal
from mpq.loading import load_model, model_file
from mpq.models.base import AsrModel
from mpq.progress import progress
from mpq.runtime import choose_device, memory_for
from mpq.sensitivity.calibration import (
    BATCH_SECONDS,
    HELD_OUT_SECONDS,
    CalibrationData,
    further,
    in_batches,
    redraw,
    statistics,
)
from mpq.sensitivity.divergence import BOUND, JointDivergence
from mpq.sensitivity.records import SensitivityTable

MOST_PROMISING = 24
"""Raises, and cuts, that are measured one by one in a round."""
TRIES = 12
"""Pairs in a row that may fail before a round ends."""
CONFIDENCE = 0.975
"""Of Student's one-sided test that a move's effect has to pass. The pairs tried are those whose parts measured best on
the same audio, so more pass by chance than the level says; the verdict's audio tells."""


def allocate_measured(
    table: SensitivityTable,
    checkpoint: Path,
    out: Path,
    budgets: Mapping[str, float | None],
    *,
    keep: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
    tie: Sequence[str] = (),
    whole_frontier: bool = False,
    points: int = 5,
    refine_minutes: float = 0.0,
    data: Path | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> Allocation:
    """Solves the allocation, measures it and some sizes of the frontier, refines it if asked to, and writes `out`.

    Args:
        table: The sensitivities; its model and data have to be at hand.
        checkpoint: The float model that they were measured on.
        out: The `mpq.allocation/1` file to write.
        budgets: One of `mpq.allocation.solve.allocate`'s, such as {"target_mb": 7.5}; others may be there as None.
            {"max_divergence": F} bounds the measured divergence here; the smallest file that keeps it is searched for
            by halving.
        keep, exclude, tie, whole_frontier: As in `mpq.allocation.solve.allocate`.
        points: Sizes, evenly spaced over the frontier, that are measured besides the answer.
        refine_minutes: How long to look for better moves; 0 is not at all.
        data: Where the data are now, if not where the table says.
        device, quiet: As in `mpq.sensitivity.measure.measure_sensitivity`.

    Raises:
        MpqError: Bad input of any kind, other data than the table's, or no audio besides what the table has seen.
    """
    if points < 0 or not (math.isfinite(refine_minutes) and refine_minutes >= 0):
        raise MpqError(f"--points, --minutes: expected 0 or more, got {points} and {refine_minutes:g}")
    name, value = one_budget(budgets)
    limit = value if name == "max_divergence" else None
    if limit is not None and limit >= BOUND:
        raise MpqError(f"max_divergence: what is measured is below {BOUND:g} nat whatever is done, got {limit:g}")
    if limit is not None and refine_minutes:
        raise MpqError("moves keep a size: expected a size as the budget to refine under, got max_divergence")
    checkpoint = model_file(checkpoint)
    check_output(out, checkpoint, data)

    def solve(whole: bool = False, **size: float) -> Allocation:
        return allocate(table, **size, keep=keep, exclude=exclude, tie=tie, whole_frontier=whole)

    decisions = list_decisions(table, keep or {}, exclude, tie)
    smallest, largest = (
        table.fixed_bytes + sum(of(decision.size_bytes) for decision in decisions) for of in (min, max)
    )
    allocation = solve(whole_frontier, **{name: value}) if limit is None else solve(target_bytes=largest)
    model = load_model(checkpoint, choose_device(device))
    if model.quantized_bits:
        raise MpqError(f"{checkpoint}: already packed; measure with the float checkpoint that it was made from")
    sha256 = sha256_file(checkpoint)
    if table.model.get("sha256", sha256) != sha256:
        raise MpqError(f"{checkpoint}: the sensitivities are those of another checkpoint, {table.model.get('path')}")
    check_names(model.weights(), allocation.bits)
    weight_format = WeightFormat.from_json(table.quantizer)
    seen = redraw(model, table.data, data)
    deciding_seconds = min(HELD_OUT_SECONDS, sum(seen.rest_durations) / 2)
    used = further(model, seen, deciding_seconds) if refine_minutes and seen.rest else seen
    fresh = further(model, used, HELD_OUT_SECONDS)
    if not fresh.utterances or (refine_minutes and len(used.utterances) < 2):
        raise MpqError(
            f"{seen.path}: no audio is left to measure on (to refine takes 3 utterances): {sum(seen.durations):.0f} s "
            f"were used for the sensitivities, {sum(seen.rest_durations):.0f} s are left; measure the sensitivities on "
            "less (--seconds), or on a part of more data"
        )
    journal = None
    with memory_for(f"{seen.path}: batches of {BATCH_SECONDS:g} s"):
        grams = statistics(model, sha256, seen, weight_format, quiet)
        weights = _rounded(model, weight_format, table, grams, quiet)
        refined, refinement = allocation, {}
        if refine_minutes:
            work = [sha256, used.sha256, table.to_json(), allocation.to_json()]
            fingerprint = digest(work)
            journal = Journal(out.with_name(out.name + ".journal"), fingerprint)
            journal.begin()
            with _measuring(model, used) as joint:
                meter = _Meter(joint, weights, journal)
                codes = Fraction(str(value)) if name == "average_bits" else None
                refined, refinement = _refined(meter, table, decisions, allocation, codes, 60 * refine_minutes, quiet)
            refinement |= {"max_seconds": deciding_seconds, "seconds": round(math.fsum(used.durations), 3)}
        with _measuring(model, fresh) as joint:
            meter = _Meter(joint, weights)
            sizes = [smallest + (largest - smallest) * step // max(points - 1, 1) for step in range(points)]
            measured = [meter.point(solve(target_bytes=size)) for size in sizes]
            if limit is not None:
                allocation, tried = _within(solve, meter, smallest, largest, limit)
                measured += tried
                if whole_frontier:
                    allocation = solve(True, target_bytes=allocation.target_bytes)
            measured.append(meter.point(allocation))
            if refinement:
                refinement["measured_before"] = measured[-1][2]
                measured.append(meter.point(refined))
    allocation = replace(
        refined if refinement else allocation,
        measured=tuple(sorted(set(measured))),
        measured_kl=measured[-1][2],
        measured_seconds=round(math.fsum(fresh.durations), 3),
        refinement=refinement,
    )
    allocation.save(out)
    if journal:
        journal.remove()
    return allocation


def _rounded(
    model: AsrModel, weight_format: WeightFormat, table: SensitivityTable, grams: Mapping[str, Tensor], quiet: bool
) -> dict[str, dict[int, Tensor]]:
    """Returns {weight name: {bits: what the packed file gives back}}: 4 bytes x widths for each weight."""
    state = model.state_dict()
    found: dict[str, dict[int, Tensor]] = {}
    with progress("rounding", len(table.layers), quiet, "layers") as advance:
        for ref in model.weights():
            weight = state[ref.name].clone()
            rounded = quantize_layer(ref.name, weight, weight_format, table.bits, grams)
            found[ref.name] = dict(zip(table.bits, rounded, strict=True))
            found[ref.name] |= {16: weight.half().float(), 32: weight}
            advance(1)
    return found


@contextmanager
def _measuring(model: AsrModel, data: CalibrationData) -> Iterator[JointDivergence]:
    """Yields what measures a model; it has its own weights again afterwards."""
    joint = JointDivergence(model, in_batches(model, data, BATCH_SECONDS))
    try:
        yield joint
    finally:
        joint.restore()


def _key(bits: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(bits.items())).encode()).hexdigest()


class _Meter:
    """Measures models by their bit-widths, each only once.

    Args:
        joint: Of the model.
        weights: As `_rounded` returns them.
        journal: Keeps what was measured, and how long it took.
    """

    def __init__(
        self, joint: JointDivergence, weights: Mapping[str, Mapping[int, Tensor]], journal: Journal | None = None
    ) -> None:
        self.joint, self.weights, self.journal = joint, weights, journal
        self.bits: dict[str, int] = {}  # of the model as it is now
        self.known: dict[str, Tensor] = {}
        self.seconds = 0.0
        for entry in journal.read() if journal else ():
            self.known[entry["key"]] = torch.tensor(entry["kl"], dtype=torch.float64)
            self.seconds += entry["seconds"]

    def is_known(self, bits: Mapping[str, int]) -> bool:
        """Returns whether the model with these widths was measured already, so that it takes no time."""
        return _key(bits) in self.known

    def kl(self, bits: Mapping[str, int]) -> Tensor:
        """Returns the (utterances,) divergences, summed over rows, of the model with these widths."""
        key = _key(bits)
        if key not in self.known:
            start = time.monotonic()
            self.known[key] = self.joint.measure(self._changes(bits))
            seconds = time.monotonic() - start
            self.seconds += seconds
            if self.journal:
                self.journal.append({"key": key, "kl": self.known[key].tolist(), "seconds": seconds})
        return self.known[key]

    def move_to(self, bits: Mapping[str, int]) -> None:
        """Makes these the widths that others are measured from."""
        self.joint.change(self._changes(bits))
        self.bits = dict(bits)

    def point(self, allocation: Allocation) -> tuple[int, float, float]:
        """Returns (bytes, predicted divergence, measured divergence per frame)."""
        kl = float(self.kl(allocation.bits).sum()) / self.joint.frames
        return allocation.predicted_bytes, allocation.predicted_kl, kl

    def _changes(self, bits: Mapping[str, int]) -> dict[str, Tensor]:
        return {name: self.weights[name][width] for name, width in bits.items() if self.bits.get(name) != width}


def _within(
    solve: Callable[..., Allocation], meter: _Meter, smallest: int, largest: int, limit: float
) -> tuple[Allocation, list[tuple[int, float, float]]]:
    """Returns the smallest allocation found whose measured divergence is at most `limit`, and what was measured.

    Sizes are halved until they agree to a thousandth; the measured divergence need not fall at every step of the
    frontier, so a smaller size that keeps the limit may exist.
    """
    best = solve(target_bytes=largest)
    tried = [meter.point(best)]
    if tried[0][2] > limit:
        raise MpqError(
            f"max_divergence {limit:g} is less than what was measured with the least sensitive widths: "
            f"{rounded_up(tried[0][2])} nats per frame; measure wider ones"
        )
    low, high = smallest - 1, best.predicted_bytes
    while high - low > largest // 1000:
        candidate = solve(target_bytes=(low + high) // 2)
        tried.append(meter.point(candidate))
        if tried[-1][2] <= limit:
            best, high = candidate, candidate.predicted_bytes
        else:
            low = (low + high) // 2
    return replace(best, target_bytes=best.predicted_bytes), tried


def _refined(
    meter: _Meter,
    table: SensitivityTable,
    decisions: Sequence[Decision],
    start: Allocation,
    average_bits: Fraction | None,
    seconds: float,
    quiet: bool,
) -> tuple[Allocation, dict[str, Any]]:
    """Returns the allocation after the moves that were kept, and {"moves", "measurements", "before", "after"}.

    The size stays within the start's target, and the code bits within `average_bits` if that is what was asked for.
    """
    choices = [d.bits.index(start.bits[table.layers[d.layers[0]].name]) for d in decisions]
    budget = start.target_bytes - table.fixed_bytes
    weights = sum(layer.numel for layer in table.layers)

    def bits(of: Sequence[int]) -> dict[str, int]:
        return chosen_bits(table, decisions, of)

    def moved(*steps: tuple[int, int]) -> list[int]:
        result = list(choices)
        for index, step in steps:
            result[index] += step
        return result

    def fits(of: Sequence[int]) -> bool:
        pairs = list(zip(decisions, of, strict=True))
        code_bits = sum(d.code_bits[choice] for d, choice in pairs)
        return sum(d.size_bytes[choice] for d, choice in pairs) <= budget and (
            average_bits is None or code_bits <= average_bits * weights
        )

    meter.move_to(bits(choices))
    first = current = meter.kl(bits(choices))
    quantile = float(stats.t.ppf(CONFIDENCE, len(first) - 1))
    moves = 0
    with progress("refining", seconds, quiet, "s") as advance:
        shown = 0.0

        def change(*steps: tuple[int, int]) -> Tensor | None:
            """Returns what a move adds to the divergence of each utterance; None when the time is over."""
            nonlocal shown
            widths = bits(moved(*steps))
            if meter.seconds >= seconds and not meter.is_known(widths):
                return None
            result = meter.kl(widths) - current
            advance(min(meter.seconds, seconds) - shown)
            shown = min(meter.seconds, seconds)
            return result

        is_better = True
        while is_better:
            is_better = False
            singles: dict[tuple[int, int], float] = {}
            for index, step in _promising(decisions, choices):
                effect = change((index, step))
                if effect is None:
                    break
                singles[index, step] = float(effect.sum())
            raises = [move for move in singles if move[1] > 0]
            cuts = [move for move in singles if move[1] < 0]
            pairs = [(move,) for move in singles] + [(up, down) for up in raises for down in cuts if up[0] != down[0]]
            pairs.sort(key=lambda pair: sum(singles[move] for move in pair))
            touched: set[int] = set()
            failures = 0
            for pair in pairs:
                if failures == TRIES or sum(singles[move] for move in pair) >= 0:
                    break
                if touched & {index for index, _ in pair} or not fits(moved(*pair)):
                    continue
                effect = change(*pair)
                if effect is None:
                    break
                if float(effect.sum()) >= -quantile * float(effect.std()) * math.sqrt(len(effect)):
                    failures += 1
                    continue
                choices = moved(*pair)
                current = current + effect
                meter.move_to(bits(choices))
                touched |= {index for index, _ in pair}
                moves, failures, is_better = moves + 1, 0, True
    size, kl = totals(table, decisions, choices)
    frontier, _ = with_answer(start.frontier, size, kl, start.target_bytes)
    widths = bits(choices)
    refined = replace(
        start,
        bits=widths,
        predicted_bytes=size,
        predicted_kl=kl,
        average_bits=weighted_average(table, widths),
        frontier=tuple(frontier),
        frontier_note=start.frontier_note + ("; moves made the answer leave it" if moves else ""),
    )
    return refined, {
        "moves": moves,
        "measurements": len(meter.known),
        "before": float(first.sum()) / meter.joint.frames,
        "after": float(current.sum()) / meter.joint.frames,
    }


def _promising(decisions: Sequence[Decision], choices: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (decision, +1 or -1): the raises that the table promises most of for a byte, the cuts that cost least."""
    raises, cuts = [], []
    for index, (decision, choice) in enumerate(zip(decisions, choices, strict=True)):
        for step, found in ((1, raises), (-1, cuts)):
            if 0 <= choice + step < len(decision.bits):
                kl = decision.kl[choice + step] - decision.kl[choice]
                size = abs(decision.size_bytes[choice + step] - decision.size_bytes[choice])
                found.append((kl / max(size, 1), index, step))
    return [(index, step) for found in (raises, cuts) for _, index, step in sorted(found)[:MOST_PROMISING]]
