"""Measured and refined allocations against whole forward passes of models that are quantized from scratch."""

import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy import stats
from tiny_data import audio_seconds, drawn_parts, plain_divergence
from tiny_models import tiny_model
from torch import Tensor

from mpq.allocation.decisions import Constraints
from mpq.allocation.moves import Effort
from mpq.allocation.records import Allocation
from mpq.allocation.refine import allocate_measured
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.divergence import JointDivergence
from mpq.sensitivity.measure import measure_sensitivity
from mpq.sensitivity.records import SensitivityTable
from mpq.sensitivity.statistics import input_grams

SEEN, USED, FRESH = 1.5, 4.0, 4.0
"""Seconds of the three parts of the audio: for the sensitivities, the moves, the verdict."""


FEW = Effort(most_promising=8, tries=4)
"""Few moves."""


def table_of(folder: Path, archive: Path, manifest: Path, seconds: float | None = SEEN, **options) -> SensitivityTable:
    spec = QuantSpec(8, rounding=options.pop("rounding", "nearest"))
    options |= {"max_seconds": seconds, "method": "kl", "device": "cpu", "quiet": True}
    return measure_sensitivity(archive, manifest, (2, 3, 4, 6), folder / "sens.json", WeightFormat(spec), **options)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, tiny_archive: Path, many_tones: Path) -> SensitivityTable:
    return table_of(tmp_path_factory.mktemp("table"), tiny_archive, many_tones)


@pytest.fixture(scope="module")
def misled(table: SensitivityTable) -> SensitivityTable:
    """The table with the divergences of other layers, so that there is much to gain by measuring."""
    kls = [layer.kl for layer in table.layers]
    return replace(
        table,
        layers=tuple(replace(layer, kl=kl) for layer, kl in zip(table.layers, kls[23:] + kls[:23], strict=True)),
    )


def middle(table: SensitivityTable) -> int:
    """Returns the size with all layers at 4 bits."""
    return table.fixed_bytes + sum(layer.size_bytes[4] for layer in table.layers)


def size_of(table: SensitivityTable, bits: Mapping[str, int]) -> int:
    return table.fixed_bytes + sum(
        layer.float_bytes if bits[layer.name] == 16 else layer.size_bytes[bits[layer.name]] for layer in table.layers
    )


def quantized(bits: Mapping[str, int], rounding: str = "nearest", manifest: Path | None = None) -> dict[str, Tensor]:
    """Returns the weights of the tiny model at these widths, from scratch."""
    model = tiny_model()
    grams = input_grams(model, one_by_one(model, draw(model, manifest, SEEN))) if rounding == "gptq" else {}
    state = model.state_dict()
    return {
        name: state[name].half().float()
        if width == 16
        else fake_quantize(state[name], QuantSpec(width, rounding=rounding), grams.get(name))
        for name, width in bits.items()
    }


def plain(bits: Mapping[str, int], files: list[Path], *of, output: str = "ctc") -> float:
    """Returns the divergence per frame of the tiny model with these widths."""
    changed = tiny_model()
    changed.load_state_dict(changed.state_dict() | quantized(bits, *of))
    sums, frames = plain_divergence(tiny_model(), changed, files, output).sum(dim=0).tolist()
    return sums / frames


def measured(
    table: SensitivityTable, archive: Path, out: Path, effort: Effort | None = None, seconds: float = USED, **options
) -> Allocation:
    """Returns the allocation of the middle size, measured on little audio."""
    budgets = options.pop("budgets", None) or {"target_bytes": middle(table)}
    constraints = Constraints(**{name: options.pop(name) for name in ("keep", "exclude", "tie") if name in options})
    options = {"points": 0, "device": "cpu", "held_out_seconds": seconds} | options
    return allocate_measured(table, archive, out, budgets, constraints, effort=effort, **options)


def refined(table: SensitivityTable, archive: Path, out: Path, effort: Effort = FEW, **options) -> Allocation:
    return measured(table, archive, out, effort, **options)


@pytest.mark.parametrize("rounding, output", [("nearest", "ctc"), ("gptq", "encoder")])
def test_measured_points_are_whole_forward_passes(
    tmp_path: Path, tiny_archive: Path, many_tones: Path, rounding: str, output: str
) -> None:
    table = table_of(tmp_path, tiny_archive, many_tones, rounding=rounding, output=output)
    target = middle(table)
    options = {"exclude": ["decoder.*"]}
    out = tmp_path / "a.json"
    found = measured(table, tiny_archive, out, **options, points=4)
    assert Allocation.load(out) == found
    answer = allocate(table, target_bytes=target, **options)
    assert replace(found, measured=(), measured_kl=None, measured_seconds=0.0) == answer and found.refinement == {}
    seen, fresh = drawn_parts(many_tones, SEEN, FRESH)
    assert found.measured_seconds == pytest.approx(audio_seconds(fresh), abs=1e-3)
    # the sizes, evenly spaced from the smallest to the largest that is possible
    widths = ({layer.name: 16 if "decoder" in layer.name else bits for layer in table.layers} for bits in (2, 6))
    low, high = (size_of(table, bits) for bits in widths)
    sizes = [low, low + (high - low) // 3, low + 2 * (high - low) // 3, high]
    allocations = [answer, *(allocate(table, target_bytes=size, **options) for size in sizes)]
    expected = sorted(
        (one.predicted_bytes, one.predicted_kl, plain(one.bits, fresh, rounding, many_tones)) for one in allocations
    )
    assert [point[0] for point in found.measured] == [point[0] for point in expected] and len(expected) == 5
    np.testing.assert_allclose(found.measured, expected, rtol=2e-4)
    assert (answer.predicted_bytes, answer.predicted_kl, found.measured_kl) in found.measured
    assert found.measured_kl != pytest.approx(plain(answer.bits, seen, rounding, many_tones), rel=5e-4)


@pytest.mark.parametrize("confidence", [0.975, 0.99])
def test_every_move_makes_the_output_better(
    tmp_path: Path,
    tiny_archive: Path,
    many_tones: Path,
    misled: SensitivityTable,
    monkeypatch: pytest.MonkeyPatch,
    confidence: float,
) -> None:
    states: list[Tensor] = []
    change = JointDivergence.change

    def watched(self: JointDivergence, weights: Mapping[str, Tensor]) -> None:
        change(self, weights)
        states.append(self.kl)

    monkeypatch.setattr(JointDivergence, "change", watched)
    target = middle(misled)
    start = allocate(misled, target_bytes=target)
    found = refined(misled, tiny_archive, tmp_path / "a.json", replace(FEW, confidence=confidence))
    done = found.refinement
    assert len(states) == done["moves"] + 1 >= 3
    for before, after in itertools.pairwise(states):
        test = stats.ttest_rel(before.numpy(), after.numpy(), alternative="greater")
        assert test.pvalue < 1 - confidence
    _, used, fresh = drawn_parts(many_tones, SEEN, USED, FRESH)
    assert done["before"] == pytest.approx(plain(start.bits, used), rel=2e-4)
    assert done["after"] == pytest.approx(plain(found.bits, used), rel=2e-4)
    assert done["after"] < done["before"]
    assert done["measured_before"] == pytest.approx(plain(start.bits, fresh), rel=2e-4)
    assert found.measured_kl == pytest.approx(plain(found.bits, fresh), rel=2e-4)
    assert done["seconds"] == pytest.approx(audio_seconds(used), abs=1e-3) and done["max_seconds"] == USED
    assert found.measured_seconds == pytest.approx(audio_seconds(fresh), abs=1e-3)
    # the answer is still a point of its frontier, and what it says of itself is true
    assert found.predicted_bytes == size_of(misled, found.bits) <= found.target_bytes == target
    predicted = sum(layer.kl[found.bits[layer.name]] for layer in misled.layers)
    assert found.predicted_kl == pytest.approx(predicted)
    numel = {layer.name: layer.numel for layer in misled.layers}
    average = sum(numel[name] * bits for name, bits in found.bits.items()) / sum(numel.values())
    assert found.average_bits == pytest.approx(average)
    sizes, kls = zip(*found.frontier, strict=True)
    assert list(sizes) == sorted(set(sizes)) and all(a > b for a, b in itertools.pairwise(kls))
    assert [point for point in found.frontier if point[0] <= target][-1] == (found.predicted_bytes, found.predicted_kl)
    assert set(found.frontier) - {(found.predicted_bytes, found.predicted_kl)} < set(start.frontier)
    assert {found.measured_kl, done["measured_before"]} == {kl for _, _, kl in found.measured}
    assert Allocation.load(tmp_path / "a.json") == found


def test_constraints_hold_after_moves(tmp_path: Path, tiny_archive: Path, misled: SensitivityTable) -> None:
    grouped = replace(
        misled,
        layers=tuple(replace(x, group="g" if x.name.endswith("linear_out.weight") else None) for x in misled.layers),
    )
    options = {
        "keep": {"encoder.layers.1.*": 4, "*.pre_encode.out.weight": 6},
        "exclude": ["encoder.pre_encode.conv.*"],
        "tie": ["encoder.layers.*.self_attn.linear_[qkv].weight"],
    }
    target = middle(misled) + 1000
    found = refined(grouped, tiny_archive, tmp_path / "a.json", budgets={"target_bytes": target}, **options)
    assert found.refinement["moves"] > 0 and found.bits != allocate(grouped, target_bytes=target, **options).bits
    bits = found.bits
    assert found.predicted_bytes == size_of(misled, bits) <= target
    assert min(width for name, width in bits.items() if name.startswith("encoder.layers.1.")) >= 4
    assert bits["encoder.pre_encode.out.weight"] == 6
    assert {width for name, width in bits.items() if name.startswith("encoder.pre_encode.conv.")} == {16}
    for block in (0, 1):
        assert len({bits[f"encoder.layers.{block}.self_attn.linear_{which}.weight"] for which in "qkv"}) == 1
    assert bits["encoder.layers.0.self_attn.linear_out.weight"] == bits["encoder.layers.1.self_attn.linear_out.weight"]
    assert set(bits.values()) <= {2, 3, 4, 6, 16}


def test_a_bound_on_average_bits_holds_after_moves(tmp_path: Path, tiny_archive: Path, many_tones: Path) -> None:
    """Three bits of a depthwise kernel take more bytes than one bit of a projection, but fewer code bits: the
    kernel has a zero point for every five weights."""
    table = table_of(tmp_path, tiny_archive, many_tones)
    kls = {"linear_": {2: 1e-6, 3: 9e-7, 6: 8e-7}, "depthwise_conv": {2: 3.0, 3: 2.0, 6: 1.0}}
    layers = tuple(
        replace(layer, kl=next((kl for name, kl in kls.items() if name in layer.name), layer.kl))
        for layer in table.layers
    )
    exclude = [layer.name for layer in layers if not any(name in layer.name for name in kls)]
    widths = {name: 6 if "depthwise" in name else 16 if name in exclude else 2 for name in (x.name for x in layers)}
    numel = sum(layer.numel for layer in layers)
    codes = sum(layer.numel * widths[layer.name] for layer in layers)
    average = math.ceil(1e6 * codes / numel) / 1e6
    table = replace(table, layers=layers, bits=(2, 3, 6))
    options = {"budgets": {"average_bits": average}, "exclude": exclude}
    start = measured(table, tiny_archive, tmp_path / "a.json", **options)
    assert start.bits == widths
    found = refined(table, tiny_archive, tmp_path / "a.json", **options)
    assert found.predicted_bytes <= start.target_bytes
    assert found.average_bits <= average


def test_without_time_or_gain_the_start_stays(tmp_path: Path, tiny_archive: Path, misled: SensitivityTable) -> None:
    out = tmp_path / "a.json"
    start = allocate(misled, target_bytes=middle(misled))
    assert measured(misled, tiny_archive, out).refinement == {}
    none = refined(misled, tiny_archive, out, replace(FEW, seconds=1e-9))
    assert none.bits == start.bits and none.refinement["moves"] == 0 and none.refinement["measurements"] == 1
    assert none.measured_kl == none.refinement["measured_before"]
    none = refined(misled, tiny_archive, out, replace(FEW, confidence=1.0))  # no fall is sure enough
    assert none.bits == start.bits and none.refinement["moves"] == 0 and none.refinement["measurements"] > 10
    assert none.refinement["before"] == none.refinement["after"]
    none = refined(replace(misled, bits=(4,)), tiny_archive, out)
    assert set(none.bits.values()) == {4} and none.refinement["measurements"] == 1


def test_one_utterance_is_no_reason_to_move(tmp_path: Path, tiny_archive: Path, misled: SensitivityTable) -> None:
    """Of one utterance there is no standard error, so no fall is known to be more than chance."""
    with pytest.raises(MpqError, match="to refine takes 3 utterances"):
        refined(misled, tiny_archive, tmp_path / "a.json", seconds=0.1)


def ticking() -> Callable[[], float]:
    """Returns a clock on which a second passes with each look at it."""
    seconds = itertools.count(1.0)
    return lambda: next(seconds)


class Watched:
    """Counts the measurements, and breaks off at the one after `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.most = 0, 10**9
        measure = JointDivergence.measure

        def watched(joint: JointDivergence, weights: Mapping[str, Tensor]) -> Tensor:
            if self.count == self.most:
                raise KeyboardInterrupt
            self.count += 1
            return measure(joint, weights)

        monkeypatch.setattr(JointDivergence, "measure", watched)

    def run(self, *arguments, most: int = 10**9, **options) -> Allocation:
        self.count, self.most = 0, most
        return refined(*arguments, **options)


@pytest.mark.parametrize("seconds", [10**6, 25])
def test_a_run_that_was_killed_goes_on(
    tmp_path: Path, tiny_archive: Path, misled: SensitivityTable, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """To the same result, whenever it is killed: while it looks for moves, and (the last two) while it measures."""
    out, journal = tmp_path / "a.json", tmp_path / "a.json.journal"
    effort = replace(FEW, seconds=seconds)
    watched = Watched(monkeypatch)
    whole = watched.run(misled, tiny_archive, out, effort, clock=ticking())
    looked, total = whole.refinement["measurements"], watched.count
    assert total == looked + 2 and whole.refinement["moves"] > 0
    assert looked == 25 if seconds == 25 else looked > 30
    for most in (1, 4, looked // 2, looked - 1, looked, looked + 1):
        out.unlink()
        with pytest.raises(KeyboardInterrupt):
            watched.run(misled, tiny_archive, out, effort, clock=ticking(), most=most)
        assert journal.exists() and not out.exists()
        assert watched.run(misled, tiny_archive, out, effort, clock=ticking()) == whole, most
        assert watched.count == total - min(most, looked)
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_journal_of_other_work_is_not_taken(
    tmp_path: Path, tiny_archive: Path, misled: SensitivityTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.json"
    watched = Watched(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        watched.run(misled, tiny_archive, out, most=3)
    with pytest.raises(MpqError, match="unfinished results of other input"):
        watched.run(misled, tiny_archive, out, budgets={"target_bytes": middle(misled) + 1})


def test_the_parts_of_the_audio_are_disjoint(
    tmp_path: Path, tiny_archive: Path, many_tones: Path, misled: SensitivityTable
) -> None:
    seen, used, fresh = drawn_parts(many_tones, SEEN, USED, FRESH)
    assert len({*seen, *used, *fresh}) == len(seen) + len(used) + len(fresh) > 10
    found = refined(misled, tiny_archive, tmp_path / "a.json", replace(FEW, confidence=1.0))
    assert misled.data["utterances"] == len(seen)
    assert found.refinement["before"] == pytest.approx(plain(found.bits, used), rel=2e-4)
    assert found.measured_kl == pytest.approx(plain(found.bits, fresh), rel=2e-4)
    # where nothing is refined, the second part has decided nothing
    found = measured(misled, tiny_archive, tmp_path / "a.json")
    assert found.measured_kl == pytest.approx(plain(found.bits, used), rel=2e-4)


def test_no_audio_is_left(tmp_path: Path, tiny_archive: Path, many_tones: Path, tiny_manifest: Path) -> None:
    out = tmp_path / "a.json"
    table = table_of(tmp_path, tiny_archive, tiny_manifest, None)
    for effort in (None, FEW):
        with pytest.raises(MpqError, match=r"data\.jsonl: no audio is left .* 5 s were used.*\(--seconds\)"):
            measured(table, tiny_archive, out, effort)
    lengths = sorted(soundfile.info(file).duration for file in many_tones.parent.glob("*.wav"))
    table = table_of(tmp_path, tiny_archive, many_tones, sum(lengths[5:]))
    measured(table, tiny_archive, out)
    with pytest.raises(MpqError, match=r"no audio is left .*to refine takes 3 utterances.*--seconds"):
        refined(table, tiny_archive, out)


def test_models_and_data_have_to_be_the_tables(
    tmp_path: Path, tiny_archive: Path, deeper_archive: Path, many_tones: Path, table: SensitivityTable
) -> None:
    out = tmp_path / "a.json"
    with pytest.raises(MpqError, match=r"deeper\.nemo: .*another checkpoint, .*tiny\.nemo"):
        refined(table, deeper_archive, out)
    with pytest.raises(MpqError, match="has no bit-width for encoder"):
        refined(replace(table, model={}), deeper_archive, out)
    folder = shutil.copytree(many_tones.parent, tmp_path / "moved")
    moved = folder / many_tones.name
    assert measured(table, tiny_archive, out, data=moved) == measured(table, tiny_archive, out)
    (file, *_), _ = drawn_parts(moved, SEEN, FRESH)
    soundfile.write(file, 0.5 * soundfile.read(file)[0], 16000)
    with pytest.raises(MpqError, match=r"moved/tones\.jsonl: not the audio that the sensitivities were measured with"):
        measured(table, tiny_archive, out, data=moved)
    shutil.rmtree(folder)
    with pytest.raises(MpqError, match=r"moved/tones\.jsonl: no such file"):
        measured(table, tiny_archive, out, data=moved)
    with pytest.raises(MpqError, match="would be overwritten"):
        measured(table, tiny_archive, many_tones, data=many_tones)
    with pytest.raises(MpqError, match="do not say which audio"):
        refined(replace(table, data={"path": str(many_tones), "utterances": 3}), tiny_archive, out, 0)


def test_the_divergence_that_is_asked_for_is_measured(
    tmp_path: Path, tiny_archive: Path, many_tones: Path, table: SensitivityTable
) -> None:
    out = tmp_path / "a.json"
    _, fresh = drawn_parts(many_tones, SEEN, FRESH)
    narrowest = {layer.name: 2 for layer in table.layers}
    largest = table.fixed_bytes + sum(layer.size_bytes[6] for layer in table.layers)
    best, worst = plain(allocate(table, target_bytes=largest).bits, fresh), plain(narrowest, fresh)
    sizes = []
    for limit in (1.5 * best, (best * worst) ** 0.5, 0.7 * worst):
        found = measured(table, tiny_archive, out, budgets={"max_divergence": limit})
        assert found.measured_kl == pytest.approx(plain(found.bits, fresh), rel=2e-4)
        assert found.measured_kl <= limit
        assert found.target_bytes == found.predicted_bytes == size_of(table, found.bits)
        answer = (found.predicted_bytes, found.predicted_kl)
        assert [point for point in found.frontier if point[0] <= found.target_bytes][-1] == answer
        assert (*answer, found.measured_kl) in found.measured
        # the search ended between it and a size, a thousandth smaller at most, that is too small
        below = [size for size, _, kl in found.measured if size < found.predicted_bytes and kl > limit]
        steps = [size for size, _ in found.frontier if size < found.predicted_bytes]
        assert max(below) >= max(size for size in steps if size <= found.predicted_bytes - largest // 1000)
        sizes.append(found.predicted_bytes)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    tiniest = measured(table, tiny_archive, out, budgets={"max_divergence": 0.999})
    assert tiniest.predicted_bytes <= size_of(table, narrowest) + largest // 1000
    for bits in ((3,), (2, 3), (2, 3, 4, 6)):
        narrower = replace(table, bits=bits)
        with pytest.raises(MpqError, match=r"max_divergence 1e-09 is less than .*; measure wider") as caught:
            measured(narrower, tiny_archive, out, budgets={"max_divergence": 1e-9})
        figure = float(str(caught.value).split("widths: ")[1].split()[0])  # it can be kept
        found = measured(narrower, tiny_archive, out, budgets={"max_divergence": figure})
        assert found.measured_kl <= figure <= 1.01 * plain(allocate(narrower, target_bytes=largest).bits, fresh)
