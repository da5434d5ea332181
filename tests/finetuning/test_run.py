"""Fine-tuning: the weights in the file are those that were trained; sizes, choices of epochs, averages, schedules."""

import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_finetune import (
    NEAREST,
    TRAINED,
    Spy,
    assert_holds,
    four,
    speech,
    tune,
    tuning_recipe,
    with_data,
    write_allocation,
)
from tiny_training import log_of, write_speech
from torch import Tensor

from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.finetuning.loop import Finetuner
from mpq.loading import load_model
from mpq.models.checkpoint import write_checkpoint
from mpq.models.heads import Targets
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.measure import measure_sensitivity
from mpq.speech.audio import read_audio
from mpq.speech.augment import generator, spec_mask
from mpq.training.distillation import Distillation

__all__ = ["four", "speech"]  # fixtures


def mixed_bits(name: str) -> int:
    """Widths of all kinds, and two layers left unquantized."""
    if name in ("encoder.pre_encode.conv.0.weight", "decoder.embedding.weight") or name.endswith("linear_pos.weight"):
        return 16
    return (2, 3, 4, 8)[len(name) % 4]


SCHEMES = [("asymmetric", "learned"), ("asymmetric", "recomputed"), ("symmetric", "frozen"), ("mulaw", "")]


@pytest.mark.parametrize(("scheme", "scales"), SCHEMES)
def test_the_trained_weights_are_in_the_file_bit_for_bit(
    scheme: str, scales: str, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_format = WeightFormat(
        QuantSpec(8, scheme, "channel" if scheme == "mulaw" else "group:8", rounding="nearest")
    )
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", mixed_bits, weight_format)
    spy = Spy().watch(monkeypatch)
    recipe = with_data(speech, search_every=3, **({} if scheme == "mulaw" else {"scales": scales}))
    result = tune(speech / "hybrid", path, recipe, tmp_path / "out")
    (size,) = result.sizes
    packed = tmp_path / "out/packed.safetensors"
    assert size.size_bytes == os.path.getsize(packed) == Allocation.load(path).predicted_bytes
    (seen,) = spy.seen[2]
    assert_holds(packed, seen)
    assert_holds(tmp_path / "out", seen)
    before = load_model(speech / "hybrid").state_dict()
    bits = load_model(packed).quantized_bits
    assert 16 in bits.values() and bits == {name: mixed_bits(name) for name in bits}
    moved = 0
    for name, weight in seen.items():
        if bits[name] != 16:
            start = fake_quantize(before[name], replace(weight_format.spec, bits=bits[name]))
            moved += int((start != weight).sum())
    assert moved > 100  # the training did something


def test_a_nemo_archive_and_a_float_checkpoint_that_can_be_quantized_again(
    tiny_archive: Path, tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rounding gptq, whose statistics are those of the allocation's audio."""
    table, allocation = tmp_path / "s.json", tmp_path / "a.json"
    measured = measure_sensitivity(
        tiny_archive, tiny_manifest, (2, 4, 8), table, WeightFormat(QuantSpec(8, rounding="gptq")), max_seconds=2.0,
        quiet=True,
    )  # fmt: skip
    allocate(measured, average_bits=4, exclude=["encoder.pre_encode.conv.0.weight"]).save(allocation)
    spy = Spy().watch(monkeypatch)
    recipe = tuning_recipe(tiny_manifest, tiny_manifest, batch_frames=500)
    result = tune(tiny_archive, allocation, recipe, tmp_path / "out")
    assert_holds(tmp_path / "out", spy.seen[2][0])
    for line in updates(tmp_path / "out"):  # without a decoder the CTC has the whole weight
        assert "attention_kl" not in line and line["hidden"] > 0
        assert line["loss"] == pytest.approx(line["ctc_kl"] + recipe.finetune.hidden_weight * line["hidden"])
    assert json.loads((tmp_path / "out/recipe.json").read_text())["finetune"]["ctc_weight"] == 1
    assert os.path.getsize(tmp_path / "out/packed.safetensors") == Allocation.load(allocation).predicted_bytes
    # the start is what mpq pack writes
    pack(tiny_archive, tmp_path / "plain.safetensors", Allocation.load(allocation), quiet=True)
    assert_holds(tmp_path / "plain.safetensors", spy.seen[0][0])
    again = load_model(tmp_path / "out/float.safetensors")
    assert not again.quantized_bits and again.family == "nemo"
    state, tuned, last = again.state_dict(), load_model(tmp_path / "out").state_dict(), spy.states[2]
    for index, ref in enumerate(again.weights()):
        latent = last[f"weights.latents.{index}"]
        for key, unit in last.items():
            if key.startswith(f"weights.quantizers.{index}:") and key.endswith("unit"):
                latent = latent * unit.repeat_interleave(64, dim=1)[:, : latent.shape[1]]
        torch.testing.assert_close(state[ref.name], latent.reshape(ref.shape), rtol=1e-6, atol=0)
    for name, tensor in tuned.items():
        if name not in load_model(tmp_path / "out").quantized_bits and tensor.is_floating_point():
            torch.testing.assert_close(state[name], tensor, rtol=2e-3, atol=1e-3)  # half precision in the file
    measure_sensitivity(
        tmp_path / "out/float.safetensors", tiny_manifest, (4, 8), tmp_path / "t.json", NEAREST, max_seconds=2.0,
        quiet=True,
    )  # fmt: skip
    assert result.sizes[0].average_bits == pytest.approx(Allocation.load(allocation).average_bits)
    with pytest.raises(MpqError, match="already packed; fine-tune the float checkpoint"):
        tune(tmp_path / "out", allocation, recipe, tmp_path / "more")


@pytest.mark.parametrize("start", [0.0, 1e-7])
def test_the_size_is_kept_where_biases_are_too_small_for_half_precision(
    start: float, speech: Path, tmp_path: Path
) -> None:
    """Biases of 0 that move by a millionth are stored in half; those that half precision spoils are not trained."""
    model = load_model(speech / "hybrid")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(start * torch.arange(1, len(parameter) + 1))
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model/model.safetensors", model)
    path = write_allocation(tmp_path / "a.json", tmp_path / "model", 4)
    tune(tmp_path / "model", path, with_data(speech, rest_rate=1e-6), tmp_path / "out")
    assert os.path.getsize(tmp_path / "out/packed.safetensors") == Allocation.load(path).predicted_bytes
    packed, exact = load_model(tmp_path / "out").state_dict(), load_model(tmp_path / "out/float.safetensors")
    biases = {name: one for name, one in exact.named_parameters() if name.endswith("bias")}
    moved = [name for name, one in biases.items() if not torch.equal(one, model.state_dict()[name])]
    assert len(moved) > 10 if start == 0 else not moved
    for name, bias in biases.items():
        assert torch.equal(packed[name], bias.half().float() if start == 0 else bias)


def test_running_statistics_that_half_precision_spoils_are_not_updated(speech: Path, tmp_path: Path) -> None:
    model = load_model(speech / "hybrid")
    model.encoder.layers[0].conv.batch_norm.running_var.fill_(3.3e-7)
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model/model.safetensors", model)
    path = write_allocation(tmp_path / "a.json", tmp_path / "model", 4)
    with pytest.raises(
        MpqError, match=r'batch_norm: "updated" would change encoder.layers.0.*running_var.*use "frozen"'
    ):
        tune(tmp_path / "model", path, with_data(speech, batch_norm="updated"), tmp_path / "out")
    tune(tmp_path / "model", path, with_data(speech, epochs=1), tmp_path / "out")


def test_what_is_not_trained_stays_as_it_was(speech: Path, tmp_path: Path) -> None:
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 3)
    tune(speech / "hybrid", path, with_data(speech, rest_rate=0.0), tmp_path / "out")
    before, after = load_model(speech / "hybrid"), load_model(tmp_path / "out/float.safetensors").state_dict()
    names = {ref.name for ref in before.weights()}
    for name, tensor in before.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(after[name], tensor) != (name in names), name


# ---- what it is trained on


def bare(folder: Path, *kept: int) -> Path:
    """Returns the folder's training manifest with the transcripts of some utterances alone."""
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        if index not in kept:
            del line["text"]
    path = folder / f"bare{''.join(map(str, kept))}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def updates(out: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(out) if "rate" in line]


def test_without_transcripts_it_is_the_same_as_with_ignored_ones(speech: Path, four: Path, tmp_path: Path) -> None:
    for name, train in (("texts", speech / "train.jsonl"), ("none", bare(speech))):
        recipe = tuning_recipe(train, speech / "dev.jsonl")
        result = tune(speech / "hybrid", four, recipe, tmp_path / name)
        assert result.transcribed == (4 if name == "texts" else 0)
    assert updates(tmp_path / "texts") == updates(tmp_path / "none")
    first = updates(tmp_path / "none")[0]
    assert set(first) == {"step", "epoch", "loss", "ctc_kl", "attention_kl", "hidden", "norm", "rate"}
    files = [(tmp_path / name / "packed.safetensors").read_bytes() for name in ("texts", "none")]
    assert files[0] == files[1]
    words = "unknown letters"  # which the vocabulary lacks: ignored transcripts need not fit
    odd = write_speech(tmp_path / "odd", ("abc", "bad"), "odd.jsonl")
    odd.write_text(odd.read_text().replace("abc", words))
    tune(speech / "hybrid", four, tuning_recipe(odd, speech / "dev.jsonl", epochs=1), tmp_path / "odd/out")
    with pytest.raises(MpqError, match=r"odd\.jsonl:1"):
        tune(speech / "hybrid", four, tuning_recipe(odd, speech / "dev.jsonl", transcript_weight=0.5), tmp_path / "o")


def test_first_update_by_hand(speech: Path, four: Path, tmp_path: Path) -> None:
    """Losses of a part with and a part without transcripts, each over what it has; the teacher hears no masks."""
    masks = {"time_masks": 2, "time_mask_width": 9, "frequency_masks": 2, "frequency_mask_width": 5}
    recipe = tuning_recipe(
        bare(speech, 0, 3), speech / "dev.jsonl", transcript_weight=0.3, ctc_weight=0.4, hidden_weight=0.7, bound=0.5,
        label_smoothing=0.1, batch_frames=10000, epochs=1, finetune_augment=masks, seed=5,
    )  # fmt: skip
    result = tune(speech / "hybrid", four, recipe, tmp_path / "out")
    assert result.transcribed == 2
    (found,) = updates(tmp_path / "out")
    model = load_model(speech / "hybrid")
    state = model.state_dict()
    trained = {ref.name: state[ref.name] for ref in model.weights()}
    weights = QuantizedWeights(trained, [dict.fromkeys(trained, 4)], NEAREST, {}, "learned")
    loss = Distillation(model, weights, load_model(speech / "hybrid"), 0.5, 0.1, True, True)
    sums: dict[str, float] = defaultdict(float)
    for index, text in enumerate(TRAINED):
        waveform = read_audio(speech / f"train-{index}.wav", 8000)[None]
        clean, frames = model.features(waveform, torch.tensor([waveform.shape[1]]))
        heard = clean.clone()
        mask = spec_mask(int(frames), 20, recipe.finetune_augment, generator(5, 0, f"train-{index}", "mask"))
        heard[0, : len(mask)][mask] = 0.0
        known = index in (0, 3)
        tokens = Targets.of([model.tokenizer.encode(text) if known else []])
        each = loss(heard, clean, frames, tokens, torch.tensor([known]), 0)
        figures = {f"{head}_kl": one for head, one in each.kl.items()} | each.transcripts
        figures |= {"hidden": each.hidden, "frames": each.frames, "tokens": each.rows["attention"]}
        for name, value in figures.items():
            sums[name] += float(value.detach())
    spoken = sum(len(TRAINED[index]) for index in (0, 3))
    ctc_kl, attention_kl = sums["ctc_kl"] / sums["frames"], sums["attention_kl"] / sums["tokens"]
    hidden, ctc, attention = sums["hidden"] / sums["frames"], sums["ctc"] / spoken, sums["attention"] / (spoken + 2)
    values = {"ctc_kl": ctc_kl, "attention_kl": attention_kl, "hidden": hidden, "ctc": ctc, "attention": attention}
    for name, value in values.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    told = 0.4 * ctc + 0.6 * attention
    assert found["loss"] == pytest.approx(
        0.7 * (0.4 * ctc_kl + 0.6 * attention_kl + 0.7 * hidden) + 0.3 * told, rel=1e-4
    )
    masked = tuning_recipe(**arguments_of(recipe, speech), teacher_hears="masked")
    tune(speech / "hybrid", four, masked, tmp_path / "masked")
    (other,) = updates(tmp_path / "masked")
    assert other["ctc"] == found["ctc"] and other["ctc_kl"] < found["ctc_kl"]


def test_updates_are_those_of_adam_with_a_rate_for_each_kind(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in steps of their grid, learned scales, and the rest with the layers that are left unquantized."""
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", mixed_bits)
    gradients: list[list[Tensor]] = []
    finish = Finetuner.finish_update

    def watched(tuner: Finetuner) -> None:
        gradients.append([one.grad.double() for one in tuner._trained()])
        finish(tuner)

    monkeypatch.setattr(Finetuner, "finish_update", watched)
    spy = Spy().watch(monkeypatch)
    options = {"learning_rate": 0.2, "scale_rate": 0.03, "rest_rate": 0.004, "betas": [0.8, 0.95], "clip_norm": 0.3}
    recipe = with_data(speech, **options, schedule="constant", warmup_steps=2, epochs=3)
    tune(speech / "hybrid", path, recipe, tmp_path / "out")
    bits = load_model(tmp_path / "out").quantized_bits
    widths = [bits[name] for name in spy.tuner.weights.names]
    kinds = []
    for name, _ in spy.tuner.weights.named_parameters():
        is_float = name.startswith("latents.") and widths[int(name.split(".")[1])] == 16
        kinds.append("scale_rate" if name.endswith("log_scale") else "rest_rate" if is_float else "learning_rate")
    kinds += ["rest_rate"] * len(spy.tuner.rest)
    assert {kind: kinds.count(kind) > 1 for kind in set(kinds)} == dict.fromkeys(
        ("learning_rate", "scale_rate", "rest_rate"), True
    )
    now = [one.double() for one in spy.updates[0]]
    moments = [[torch.zeros_like(one), torch.zeros_like(one)] for one in now]
    log = updates(tmp_path / "out")
    assert len(log) == len(gradients) >= 6
    for step, found in enumerate(gradients, start=1):
        norm = float(torch.stack([one.square().sum() for one in found]).sum().sqrt())
        assert norm == pytest.approx(min(log[step - 1]["norm"], 0.3), rel=1e-3)
        assert log[step - 1]["rate"] == pytest.approx(0.2 * min(1.0, step / 2))
        for index, (gradient, kind) in enumerate(zip(found, kinds, strict=True)):
            mean, square = moments[index]
            mean.mul_(0.8).add_(0.2 * gradient)
            square.mul_(0.95).add_(0.05 * gradient**2)
            unbiased, root = mean / (1 - 0.8**step), (square / (1 - 0.95**step)).sqrt()
            now[index] = now[index] - options[kind] * min(1.0, step / 2) * unbiased / (root + 1e-8)
            expected = spy.updates[step][index].double()
            torch.testing.assert_close(now[index], expected, rtol=1e-4, atol=1e-5, msg=f"{step} {index} {kind}")
            now[index] = expected


def arguments_of(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Returns what `tuning_recipe` made a recipe from."""
    tuning = recipe.finetune.model_dump(exclude={"teacher_hears"}, exclude_defaults=True)
    sections = {"seed": recipe.seed, "finetune_augment": recipe.finetune_augment.model_dump()}
    sections["finetune_augment"] = recipe.finetune_augment.model_dump(exclude={"snr_db", "level_db"})
    return {"train": Path(recipe.data.train[0]), "dev": folder / "dev.jsonl"} | tuning | sections


def test_transcripts_that_are_missing(speech: Path, four: Path, tmp_path: Path) -> None:
    none = bare(speech)
    with pytest.raises(
        MpqError, match=r"finetune.transcript_weight: 0.3 needs transcripts, and none of the 4 training"
    ):
        tune(speech / "hybrid", four, tuning_recipe(none, speech / "dev.jsonl", transcript_weight=0.3), tmp_path / "a")
    with pytest.raises(MpqError, match=r'finetune.select: "wer" needs transcripts in the held-out data'):
        tune(speech / "hybrid", four, tuning_recipe(none, none, select="wer"), tmp_path / "b")
    assert not any((tmp_path / name).exists() for name in "ab")
    result = tune(speech / "hybrid", four, tuning_recipe(none, none, select="loss"), tmp_path / "c")
    assert result.sizes[0].wer is None and result.sizes[0].start_wer is None
    best = min(result.epochs, key=lambda one: one.dev_loss)
    assert result.averaged == (best.epoch,)
    result = tune(speech / "hybrid", four, tuning_recipe(none, bare(speech, 0), select="wer", epochs=1), tmp_path / "d")
    assert result.sizes[0].wer is not None
