"""Fine-tuning of entropy-coded weights, from the allocation to the file: sizes are kept, weights are those trained."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tiny_finetune import (
    OPTIONS,
    Spy,
    assert_holds,
    assert_same_training,
    speech,
    tune,
    tuning_recipe,
    two_processes,
    with_data,
    write_allocation,
)
from tiny_training import CrashError, fails_at, log_of

from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.finetuning.loop import Finetuner
from mpq.finetuning.record import FinetuneResult
from mpq.loading import load_model
from mpq.quantization.quantizers import dequantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.measure import measure_sensitivity

__all__ = ["speech"]  # a fixture

CODED = WeightFormat(QuantSpec(8, "entropy"))


def mixed(name: str) -> float:
    """Rates of all kinds, and two layers left unquantized."""
    if name in ("encoder.pre_encode.conv.0.weight", "decoder.embedding.weight"):
        return 16
    return (1.3, 2, 3.45, 5)[len(name) % 4]


def stretches(out: Path) -> list[list[float]]:
    """Returns the factors of all allocations after each epoch, as the log has them."""
    return [line["stretch"] for line in log_of(out) if "dev_loss" in line]


@pytest.mark.parametrize("scales", ["learned", "frozen"])
def test_the_trained_weights_are_in_the_file_and_keep_its_size(
    scales: str, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At rates that make codes larger, so that steps have to be."""
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", mixed, CODED)
    spy = Spy().watch(monkeypatch)
    result = tune(speech / "hybrid", path, with_data(speech, scales=scales, learning_rate=1.0), tmp_path / "out")
    (size,), promised = result.sizes, Allocation.load(path).predicted_bytes
    packed = tmp_path / "out/packed.safetensors"
    assert size.size_bytes == os.path.getsize(packed) <= promised
    assert_holds(packed, spy.seen[2][0])
    assert load_model(packed).quantized_bits == {name: mixed(name) for name in spy.tuner.weights.names}
    moved = sum(int((spy.seen[0][0][name] != weight).sum()) for name, weight in spy.seen[2][0].items())
    assert moved > 1000  # the training did something
    found = stretches(tmp_path / "out")
    assert len(found) == 3 and found[0] == [1.0] and found[2] == [size.stretch]
    assert size.stretch > 1 and 64 * math.log2(size.stretch) == pytest.approx(round(64 * math.log2(size.stretch)))
    assert FinetuneResult.load(tmp_path / "out/finetune.json").sizes == result.sizes


def test_the_next_passes_see_the_stretched_steps(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 3, CODED)
    seen, prepare = [], Finetuner.prepare_update

    def preparing(tuner: Finetuner) -> None:
        prepare(tuner)
        weights, stored = tuner.weights(), tuner.weights.quantized()
        for name, one in stored.items():
            assert torch.equal(weights[name], dequantize(one, QuantSpec(3, "entropy")))
        seen.append((tuner.epoch, tuner.weights.stretched(0), float(stored["ctc.weight"].scale)))

    monkeypatch.setattr(Finetuner, "prepare_update", preparing)
    tune(speech / "hybrid", path, with_data(speech, scales="frozen", learning_rate=1.0), tmp_path / "out")
    first, second = ({one[1:] for one in seen if one[0] == epoch} for epoch in (0, 1))
    ((before, scale),), ((after, other),) = first, second
    assert before == 1.0 < after and other == pytest.approx(after * scale, rel=1e-3)
    assert stretches(tmp_path / "out")[1] == [after]


def test_several_allocations_keep_their_own_sizes(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Average of epochs and running average included."""
    paths = [write_allocation(tmp_path / f"r{rate}.json", speech / "hybrid", rate, CODED) for rate in (2, 3.5)]
    paths.append(write_allocation(tmp_path / "mixed.json", speech / "hybrid", mixed, CODED))
    spy = Spy().watch(monkeypatch)
    recipe = with_data(speech, learning_rate=1.0, ema=0.5, average=2, select="loss", epochs=3)
    result = tune(speech / "hybrid", paths, recipe, tmp_path / "out")
    promised = {path.stem: Allocation.load(path).predicted_bytes for path in paths}
    assert [size.name for size in result.sizes] == sorted(promised, key=lambda name: -promised[name])
    for index, size in enumerate(result.sizes):
        packed = tmp_path / f"out/packed-{size.name}.safetensors"
        assert size.size_bytes == os.path.getsize(packed) <= promised[size.name]
        assert_holds(packed, spy.tuner.weights.rounded(index))
        assert size.stretch == spy.tuner.weights.stretched(index)
    last = stretches(tmp_path / "out")[-1]
    assert len(last) == 3 and len(set(last)) > 1


@pytest.mark.parametrize("options", [{"rest_rate": 0.05}, {"batch_norm": "updated"}])
def test_the_size_is_kept_where_the_rest_changes(options: dict[str, object], speech: Path, tmp_path: Path) -> None:
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 2.5, CODED)
    (size,) = tune(speech / "hybrid", path, with_data(speech, **options), tmp_path / "out").sizes
    assert size.size_bytes <= Allocation.load(path).predicted_bytes


def test_a_start_by_gptq_is_what_pack_writes(
    tiny_archive: Path, tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sensitivities at rates to the file; the steps of the columns are those of gptq's statistics."""
    weight_format = WeightFormat(QuantSpec(8, "entropy", rounding="gptq"))
    measured = measure_sensitivity(
        tiny_archive, tiny_manifest, (1.5, 2.5, 4), tmp_path / "s.json", weight_format, max_seconds=2.0, quiet=True
    )
    path = tmp_path / "a.json"
    allocate(measured, average_bits=3).save(path)
    spy = Spy().watch(monkeypatch)
    result = tune(tiny_archive, path, tuning_recipe(tiny_manifest, tiny_manifest, batch_frames=500), tmp_path / "out")
    pack(tiny_archive, tmp_path / "plain.safetensors", Allocation.load(path), quiet=True)
    assert_holds(tmp_path / "plain.safetensors", spy.seen[0][0])
    assert_holds(tmp_path / "out", spy.seen[2][0])
    assert any(bool(one.exponents[1].any()) for one in spy.tuner.weights.quantized().values())
    assert result.sizes[0].size_bytes <= Allocation.load(path).predicted_bytes
    again = load_model(tmp_path / "out/float.safetensors").state_dict()
    for name, latent in spy.tuner.weights.floats().items():
        assert torch.equal(again[name], latent)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scales": "frozen"}, marks=pytest.mark.slow),
        {"scales": "learned", "rate_weight": 0.1, "ema": 0.5},
    ],
)
def test_a_killed_fine_tuning_ends_as_if_it_had_not_been(
    options: dict[str, object], speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the epoch's stretched candidate and its state, and after an update with stretched steps."""
    paths = [write_allocation(tmp_path / f"r{rate}.json", speech / "hybrid", rate, CODED) for rate in (2, 3.5)]
    recipe = with_data(speech, learning_rate=3.0, save_minutes=1e-9, **options)
    tune(speech / "hybrid", paths, recipe, tmp_path / "whole")
    for method, call in (("_write_candidate", 2), ("losses", 3)):
        with monkeypatch.context() as patch:
            fails_at(Finetuner, method, call, patch, after=True)
            with pytest.raises(CrashError):
                tune(speech / "hybrid", paths, recipe, tmp_path / "out")
    tune(speech / "hybrid", paths, recipe, tmp_path / "out")
    assert_same_training(tmp_path / "out", tmp_path / "whole")
    assert max(map(max, stretches(tmp_path / "out"))) > 1


def test_the_rate_in_the_loss_makes_codes_smaller(speech: Path, tmp_path: Path) -> None:
    """So that steps need not be stretched, or less; the loss that is logged has it."""
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 3, CODED)
    lines = {}
    for weight in (0.0, 10.0):
        recipe = with_data(speech, scales="frozen", learning_rate=1.0, rate_weight=weight)
        (size,) = tune(speech / "hybrid", path, recipe, tmp_path / f"{weight}").sizes
        lines[weight] = [line for line in log_of(tmp_path / f"{weight}") if "norm" in line]
        assert size.size_bytes <= Allocation.load(path).predicted_bytes
        assert (size.stretch > 1) == (weight == 0), "without it they are larger"
    assert "coded_bits" not in lines[0.0][0]
    first, last = lines[10.0][0], lines[10.0][-1]
    assert last["coded_bits"] < first["coded_bits"] - 0.1
    assert first["loss"] == pytest.approx(lines[0.0][0]["loss"] + 10 * first["coded_bits"])
    assert 2.5 < first["coded_bits"] < 3.5  # the rate is 3


@pytest.mark.slow
def test_two_processes_have_the_losses_and_the_steps_of_one(speech: Path, tmp_path: Path) -> None:
    paths = [write_allocation(tmp_path / f"r{rate}.json", speech / "hybrid", rate, CODED) for rate in (2, 3.5)]
    options = OPTIONS | {"rate_weight": 0.1, "learning_rate": 3.0, "batch_frames": 300}
    command: list[object] = ["finetune", speech / "hybrid", "--train", speech / "train.jsonl"]
    command += ["--dev", speech / "dev.jsonl", "--out", tmp_path / "two", "--device", "cpu", "--quiet"]
    command += ["--allocation", paths[0], "--allocation", paths[1]]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", value]
    assert two_processes(command) == [0, 0]
    tune(speech / "hybrid", paths, with_data(speech, **options), tmp_path / "one")
    lines = [[line for line in log_of(tmp_path / name) if "norm" in line] for name in ("one", "two")]
    for first, second in zip(*lines, strict=True):
        for key, value in first.items():
            assert second[key] == pytest.approx(value, rel=5e-3), (key, first["step"])
    for first, second in zip(*(stretches(tmp_path / name) for name in ("one", "two")), strict=True):
        assert second == pytest.approx(first, rel=0.03)
    assert max(first) > 1
    result = FinetuneResult.load(tmp_path / "two/finetune.json")
    for size, path in zip(result.sizes, reversed(paths), strict=True):
        assert size.size_bytes <= Allocation.load(path).predicted_bytes


def test_options_that_do_not_go_with_the_scheme(speech: Path, tmp_path: Path) -> None:
    coded = write_allocation(tmp_path / "coded.json", speech / "hybrid", 3, CODED)
    fixed = write_allocation(tmp_path / "fixed.json", speech / "hybrid", 3)
    for path, options, words in (
        (
            coded,
            {"scales": "recomputed"},
            "finetune.scales: expected learned or frozen for the scheme entropy, got recom",
        ),
        (fixed, {"rate_weight": 0.1}, "finetune.rate_weight: does nothing for the scheme asymmetric of the allocation"),
    ):
        with pytest.raises(MpqError, match=words):
            tune(speech / "hybrid", path, with_data(speech, **options), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    plain = tune(speech / "hybrid", fixed, with_data(speech, epochs=1), tmp_path / "plain")
    assert plain.sizes[0].stretch == 1.0
    assert not any("stretch" in line for line in log_of(tmp_path / "plain"))
    old = json.loads((tmp_path / "plain/finetune.json").read_text())
    del old["sizes"][0]["stretch"]  # written before there were any
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert FinetuneResult.load(tmp_path / "old.json").sizes == plain.sizes
