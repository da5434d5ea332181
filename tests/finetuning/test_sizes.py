"""Several sizes from one training, several processes, BatchNorm and dropout, and the held-out figures."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_finetune import (
    OPTIONS,
    TRAINED,
    Spy,
    assert_holds,
    four,
    speech,
    tune,
    tuning_recipe,
    two_processes,
    with_data,
    write_allocation,
    write_hybrid,
)
from tiny_training import log_of, write_speech

from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.finetuning.loop import Finetuner
from mpq.finetuning.record import FinetuneResult
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerEncoder
from mpq.quantization.spec import QuantSpec
from mpq.runtime import Processes
from mpq.scoring.evaluate import evaluate
from mpq.sensitivity.divergence import output_divergence
from mpq.sensitivity.measure import measure_sensitivity
from mpq.speech.audio import read_audio
from mpq.training import held_out
from mpq.training.data import plan_epoch, read_set
from mpq.training.held_out import changed_errors

__all__ = ["four", "speech"]  # fixtures


def updates(out: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(out) if "rate" in line]


# ---- several allocations


def one_layer_apart(name: str) -> int:
    """A layer that this allocation alone leaves unquantized."""
    return 16 if name == "encoder.layers.0.self_attn.linear_q.weight" else 3


@pytest.fixture(scope="module")
def three(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of three sizes, the largest neither first nor last."""
    folder = tmp_path_factory.mktemp("three")
    return [
        write_allocation(folder / f"{name}.json", speech / "hybrid", bits)
        for name, bits in (("small", 2), ("large", 4), ("middle", one_layer_apart))
    ]


def test_one_training_serves_several_sizes(
    three: list[Path], speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, drawn, losses = Spy().watch(monkeypatch), [], Finetuner.losses

    def watched(tuner: Finetuner, batch: Any, index: int) -> Any:
        drawn.append((tuner.step, tuner._allocation(index)))
        return losses(tuner, batch, index)

    monkeypatch.setattr(Finetuner, "losses", watched)
    result = tune(speech / "hybrid", three, with_data(speech, epochs=4, batch_frames=140), tmp_path)
    steps = result.epochs[-1].step
    assert [one for one in drawn if one[1] == 0] == [(step, 0) for step in range(steps)]  # the largest, each time
    assert [step for step, _ in drawn] == [step for step in range(steps) for _ in range(2)]
    others = [index for _, index in drawn[1::2]]
    assert set(others) == {1, 2} and len(set(map(tuple, (others[:4], others[4:8], others[8:12])))) > 1
    per_epoch = [others[before.step : after.step] for before, after in pairwise(result.epochs)]
    assert any(len(set(some)) == 2 for some in per_epoch)  # drawn for each update, not for each epoch
    assert [size.name for size in result.sizes] == ["large", "middle", "small"]
    for index, size in enumerate(result.sizes):
        path = tmp_path / f"packed-{size.name}.safetensors"
        allocation = Allocation.load(three[0].parent / f"{size.name}.json")
        assert Path(size.path) == path and size.size_bytes == os.path.getsize(path) == allocation.predicted_bytes
        assert load_model(path).quantized_bits == allocation.bits
        assert_holds(path, spy.seen[4][index])
        assert size.divergence == pytest.approx(size.dev[4][0], rel=2e-2)  # the rest is in half precision in the file
    for epoch, done in enumerate(result.epochs):
        assert done.dev_loss == pytest.approx(sum(size.dev[epoch][0] for size in result.sizes) / 3)
        assert done.dev_wer == pytest.approx(sum(size.dev[epoch][1] for size in result.sizes) / 3)
    assert len({size.dev[0][0] for size in result.sizes}) == 3
    with pytest.raises(MpqError, match=r"a folder with several packed files; name one of them, such as .*packed-large"):
        load_model(tmp_path)
    assert load_model(tmp_path / "float.safetensors").quantized_bits == {}


def test_losses_of_an_update_are_the_mean_of_its_passes(three: list[Path], speech: Path, tmp_path: Path) -> None:
    recipe = with_data(speech, epochs=1, batch_frames=10000)
    for name, some in (("large", three[1:2]), ("small", three[:1]), ("both", three[:2])):
        tune(speech / "hybrid", some, recipe, tmp_path / name)
    large, small, both = (updates(tmp_path / name)[0] for name in ("large", "small", "both"))
    for key in ("loss", "ctc_kl", "attention_kl", "hidden"):
        assert both[key] == pytest.approx((large[key] + small[key]) / 2, rel=1e-5), key


def test_allocations_that_do_not_go_together(three: list[Path], speech: Path, tmp_path: Path) -> None:
    checkpoint, recipe = speech / "hybrid", with_data(speech)

    def refused(words: str, *allocations: Path, model: Path = checkpoint) -> None:
        with pytest.raises(MpqError, match=words):
            tune(model, list(allocations), recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    (tmp_path / "other").mkdir()
    twin = write_allocation(tmp_path / "other/small.json", checkpoint, 3)
    refused(r"another allocation is named small too; rename one of the files", three[0], twin)
    coarse = WeightFormat(QuantSpec(8, granularity="channel", rounding="nearest"))
    channel = write_allocation(tmp_path / "channel.json", checkpoint, 3, coarse)
    refused(r"allocations \w+ and \w+: expected one quantizer, got .*group:64.*channel|channel.*", three[0], channel)
    floats = write_allocation(tmp_path / "floats.json", checkpoint, 16)
    refused(r"floats.json: quantizes no layer, so there is nothing to train", floats)
    refused(r"floats.json: quantizes no layer", three[0], floats)
    above = write_allocation(tmp_path / "above.json", checkpoint, 3, target_bytes=500, predicted_bytes=400)
    refused(r"above.json: the file would have \d+ bytes, above the allocation's target of 500", above)
    lacking = Allocation.load(three[0]).bits
    lacking.popitem()
    path = tmp_path / "lacking.json"
    replace(Allocation.load(three[0]), bits=lacking).save(path)
    refused(r"lacking.json: the allocation has no bit-width for", path)
    (tmp_path / "more").mkdir()
    write_speech(tmp_path / "more"), write_speech(tmp_path / "more", name="dev.jsonl")
    other = write_hybrid(tmp_path / "more", model__layers=2)
    refused(r"small.json: .*: the allocation was made for another checkpoint, ", three[0], model=other)


# ---- several processes


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one(count: int, three: list[Path], speech: Path, tmp_path: Path) -> None:
    """With a running average; utterances without a transcript, so that the shares are uneven."""
    lines = (speech / "train.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"audio_filepath": json.loads(lines[2])["audio_filepath"]})
    (speech / "uneven.jsonl").write_text("\n".join(lines) + "\n")
    options = OPTIONS | {"transcript_weight": 0.3, "ema": 0.5, "batch_norm": "updated", "batch_frames": 300}
    for epoch in range(2):
        plans = [plan_epoch([0.2 * len(text) for text in TRAINED], 0.01, 300, 0, epoch, least) for least in (1, 2)]
        assert plans[0] == plans[1] and len(plans[0]) == 2  # no batch is too small for two
    command: list[object] = ["finetune", speech / "hybrid", "--train", speech / "uneven.jsonl"]
    command += ["--dev", speech / "dev.jsonl", "--out", tmp_path / "two", "--device", "cpu", "--quiet"]
    for path in three[1 : 1 + count]:
        command += ["--allocation", path]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", value]
    assert two_processes(command) == [0, 0]
    recipe = tuning_recipe(speech / "uneven.jsonl", speech / "dev.jsonl", **options)
    one = tune(speech / "hybrid", three[1 : 1 + count], recipe, tmp_path / "one")
    two = FinetuneResult.load(tmp_path / "two/finetune.json")
    assert (one.processes, two.processes) == (1, 2) and len(updates(tmp_path / "one")) == 4
    for first, second in zip(updates(tmp_path / "one"), updates(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert second[key] == pytest.approx(value, rel=2e-3), (key, first["step"])
    for first, second in zip(one.epochs, two.epochs, strict=True):
        assert second.dev_loss == pytest.approx(first.dev_loss, rel=5e-3)
        assert second.dev_wer == first.dev_wer
    assert [size.size_bytes for size in one.sizes] == [size.size_bytes for size in two.sizes]


def test_a_fault_in_one_process_stops_both_and_the_best_is_kept(
    four: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that writes is not the one with the fault; the third update is the first of the second epoch."""
    command: list[object] = ["finetune", speech / "hybrid", "--allocation", four, "--train", speech / "train.jsonl"]
    command += ["--dev", speech / "dev.jsonl", "--out", tmp_path / "two", "--device", "cpu", "--quiet"]
    for key, value in (OPTIONS | {"batch_frames": 300}).items():
        command += [f"--{key.replace('_', '-')}", value]
    assert two_processes(command, spoilt=1) == [2, 2]
    assert [line["step"] for line in updates(tmp_path / "two")] == [1, 2]
    spy = Spy().watch(monkeypatch)
    tune(speech / "hybrid", four, with_data(speech, batch_frames=300), tmp_path / "one")
    packed = load_model(tmp_path / "two").state_dict()
    close = [(packed[name] - weight).abs().max() < 1e-3 for name, weight in spy.seen[1][0].items()]
    assert sum(close) > 0.8 * len(close) and not (tmp_path / "two/finetune.json").exists()


# ---- BatchNorm and dropout


def watched_modes(patch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Returns what will have, for each forward pass of the loss, what is training: teacher, dropout, BatchNorm."""
    found: list[tuple[bool, ...]] = []
    losses = Finetuner.losses

    def watched(tuner: Finetuner, batch: Any, index: int) -> Any:
        norms = [one for one in tuner.student.modules() if isinstance(one, torch.nn.BatchNorm1d)]
        encoder = next(one for one in tuner.student.modules() if isinstance(one, ConformerEncoder))
        assert norms and len({one.training for one in norms}) == 1
        found.append((any(one.training for one in tuner.teacher.modules()), encoder.training, norms[0].training))
        return losses(tuner, batch, index)

    patch.setattr(Finetuner, "losses", watched)
    return found


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("batch_norm", ["frozen", "updated"])
def test_dropout_and_batch_norm_are_as_asked(
    dropout: bool, batch_norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_speech(tmp_path, ("abc", "bad", "deed"))
    write_speech(tmp_path, ("abed",), "dev.jsonl")
    checkpoint = write_hybrid(tmp_path, model__dropout=0.3)
    path = write_allocation(tmp_path / "a.json", checkpoint, 4)
    modes = watched_modes(monkeypatch)
    losses = {}
    for name, options in (("asked", {"dropout": dropout, "batch_norm": batch_norm}), ("plain", {})):
        tune(checkpoint, path, with_data(tmp_path, **options), tmp_path / name)
        losses[name] = updates(tmp_path / name)[0]["loss"]
    asked = modes[: len(modes) // 2]
    assert set(asked) == {(False, dropout, batch_norm == "updated")}
    assert (losses["asked"] == losses["plain"]) == (not dropout and batch_norm == "frozen")
    before, after = load_model(checkpoint).state_dict(), load_model(tmp_path / "asked").state_dict()
    exact = load_model(tmp_path / "asked/float.safetensors").state_dict()
    running = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert len(running) == 2
    for name in running:
        assert torch.equal(exact[name], before[name]) == (batch_norm == "frozen"), name
        assert torch.equal(after[name], exact[name].half().float()), name


# ---- held-out figures


@pytest.mark.parametrize("kind", ["hybrid", "nemo"])
def test_changed_errors_are_the_divergence_and_the_errors_of_evaluate(
    kind: str, speech: Path, four: Path, tiny_archive: Path, tiny_manifest: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one batch and in several, on one process and as shares of two."""
    checkpoint, data = (
        (speech / "hybrid", speech / "train.jsonl") if kind == "hybrid" else (tiny_archive, tiny_manifest)
    )
    path = write_allocation(tmp_path / "two.json", checkpoint, 2)
    tune(checkpoint, path, tuning_recipe(data, data, epochs=1), tmp_path / "tuned")
    recipe = tuning_recipe(data, data)
    model, changed = load_model(checkpoint), load_model(tmp_path / "tuned")
    held = read_set([str(data)], recipe.data, model, 1.0, is_training=False, texts="ignored")
    found = changed_errors(model, changed, held, "error", Processes())
    assert found[0] == pytest.approx(output_divergence(model, changed, [featured(model, data)]), rel=1e-4)
    metrics = evaluate(tmp_path / "tuned", data, tmp_path / "eval", device="cpu", quiet=True).metrics
    assert found[1] == pytest.approx(metrics.wer) and metrics.words > 0
    assert FinetuneResult.load(tmp_path / "tuned/finetune.json").sizes[0].wer == found[1]
    assert found[0] > 1e-3
    monkeypatch.setattr(held_out, "BATCH_SECONDS", 1.0)  # several batches, and the shares of two processes
    assert changed_errors(model, changed, held, "error", Processes()) == pytest.approx(found, rel=1e-4)
    monkeypatch.setattr(Processes, "add_up", lambda _, sums: shares.append(sums.clone()))
    shares: list[torch.Tensor] = []
    for rank in range(2):
        changed_errors(model, changed, held, "error", Processes(rank, 2))
    divergence, rows, errors, words = sum(shares).tolist()
    assert (divergence / rows, errors / words) == pytest.approx(found, rel=1e-4) and len(shares) == 2


def featured(model: AsrModel, manifest: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the padded features of a manifest's files, read one by one, and their frames."""
    waves: Sequence[torch.Tensor] = [
        read_audio(manifest.parent / json.loads(line)["audio_filepath"], model.sample_rate)
        for line in manifest.read_text().splitlines()
    ]
    padded = torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    return model.features(padded, torch.tensor([len(wave) for wave in waves]))


def test_a_gptq_start_needs_its_audio_or_the_cache(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without either, it is said what to do; recomputed scales need none."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    weight_format = WeightFormat(QuantSpec(8, rounding="gptq"))
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 4, weight_format)
    with pytest.raises(MpqError, match="rounding gptq needs calibration data: no calibration data are known; --data"):
        tune(speech / "hybrid", path, with_data(speech), tmp_path / "out")
    recomputed = with_data(speech, scales="recomputed", epochs=1)
    tune(speech / "hybrid", path, recomputed, tmp_path / "recomputed")
    with pytest.raises(MpqError, match=r"--data .*: the start is rounded to nearest, which needs no audio"):
        tune(speech / "hybrid", path, recomputed, tmp_path / "out", calibration=speech / "train.jsonl")
    tune(speech / "hybrid", path, with_data(speech, epochs=1), tmp_path / "out", calibration=speech / "train.jsonl")


def test_allocations_of_different_audio_do_not_go_together(speech: Path, tmp_path: Path) -> None:
    weight_format, paths = WeightFormat(QuantSpec(8, rounding="gptq")), []
    for name, bits in (("large", 4), ("small", 3)):
        path = write_allocation(tmp_path / f"{name}.json", speech / "hybrid", bits, weight_format)
        replace(Allocation.load(path), data={"path": "audio.jsonl", "sha256": name}).save(path)
        paths.append(path)
    with pytest.raises(MpqError, match="made with different calibration audio; allocate all from one sensitivity file"):
        tune(speech / "hybrid", paths, with_data(speech), tmp_path / "out")


def test_calibration_audio_that_was_moved(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by --data, and then the start is that of the audio where it was."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    audio = write_speech(tmp_path / "here", ("bad", "cede", "dad"))
    weight_format = WeightFormat(QuantSpec(8, rounding="gptq"))
    table = measure_sensitivity(
        speech / "hybrid", audio, (3, 4), tmp_path / "s.json", weight_format, output="decoder", quiet=True
    )
    allocate(table, average_bits=3).save(tmp_path / "a.json")
    pack(speech / "hybrid", tmp_path / "packed.safetensors", Allocation.load(tmp_path / "a.json"), quiet=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "other"))
    recipe, spy = with_data(speech, epochs=1), Spy().watch(monkeypatch)
    with pytest.raises(MpqError, match="--data says where they are now"):
        tune(speech / "hybrid", tmp_path / "a.json", recipe, tmp_path / "out")
    with pytest.raises(MpqError, match=r"train\.jsonl"):
        tune(speech / "hybrid", tmp_path / "a.json", recipe, tmp_path / "out", calibration=speech / "train.jsonl")
    tune(speech / "hybrid", tmp_path / "a.json", recipe, tmp_path / "out", calibration=tmp_path / "there/train.jsonl")
    assert_holds(tmp_path / "packed.safetensors", spy.seen[0][0])
