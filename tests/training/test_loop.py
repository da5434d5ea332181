"""The training loop: updates by hand, on two processes as on one, after any interruption; faults of the numbers."""

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import (
    PLAIN,
    TEXTS,
    WITHOUT_GRADIENT,
    dropping,
    environment,
    recipe,
    speech,
    train_as_process,
    updates,
    whole,
    with_options,
    write_recipe,
    write_speech,
)

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.models.heads import Targets
from mpq.speech.audio import pad_batch, read_audio
from mpq.speech.augment import generator, spec_mask
from mpq.speech.text import CharTokenizer
from mpq.training.building import build_model
from mpq.training.data import BatchReader, plan_epoch
from mpq.training.losses import JointLoss
from mpq.training.record import TrainingResult
from mpq.training.run import train

__all__ = ["dropping", "speech", "whole"]  # fixtures


def test_updates_by_hand(speech: Path, tmp_path: Path) -> None:
    """Reading, masks, batch normalisation in training, the losses' normalisation, clipping and AdamW, all once more."""
    masks = {name: value for name, value in PLAIN.items() if "mask" not in name}
    options = masks | {"data__dev": None, "train__select": "last", "train__average": 1, "train__epochs": 2}
    options |= {"train__clip_norm": 0.5, "train__weight_decay": 0.1, "train__batch_frames": 700}
    trained = recipe(speech, **options).model_copy(update={"seed": 3})
    train(trained, tmp_path, quiet=True)

    torch.manual_seed(3)
    model = build_model(trained, CharTokenizer(sorted(set("".join(TEXTS))))).train()
    moments = {name: [torch.zeros_like(one), torch.zeros_like(one)] for name, one in model.named_parameters()}
    found = updates(tmp_path)
    for epoch in range(2):
        for batch in plan_epoch([0.2 * len(text) for text in TEXTS], 0.01, 700, 3, epoch):
            record = found.pop(0)
            waveforms, lengths = pad_batch([read_audio(speech / f"train-{index}.wav", 8000) for index in batch])
            features, frames = model.features(waveforms, lengths)
            for row, index in enumerate(batch):
                random = generator(3, epoch, f"train-{index}", "mask")
                mask = spec_mask(int(frames[row]), 20, trained.augment, random)
                assert 0 < mask.sum() < 0.6 * mask.numel() or mask.sum() == 0
                features[row, : len(mask)][mask] = 0.0
            texts = [model.tokenizer.encode(TEXTS[index]) for index in batch]
            ctc, attention = JointLoss(model, 0.1)(features, frames, Targets.of(texts)).values()
            tokens = sum(map(len, texts))
            loss = 0.2 * ctc.sum() / tokens + 0.8 * attention.sum() / (tokens + len(batch))
            model.zero_grad()
            loss.backward()
            norm = sum(float(one.grad.square().sum()) for one in model.parameters()) ** 0.5
            assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert record["norm"] == pytest.approx(norm, rel=1e-3) and norm > 0.5
            with torch.no_grad():
                for name, one in model.named_parameters():
                    mean, square = moments[name]
                    gradient = one.grad * 0.5 / norm
                    mean.mul_(0.9).add_(0.1 * gradient)
                    square.mul_(0.98).add_(0.02 * gradient**2)
                    unbiased = mean / (1 - 0.9 ** record["step"])
                    root = (square / (1 - 0.98 ** record["step"])).sqrt()
                    one -= record["rate"] * (0.1 if one.ndim > 1 else 0.0) * one
                    one -= record["rate"] * unbiased / (root + 1e-8)
    assert not found
    state = model.state_dict()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name != "tokenizer" and not name.endswith(WITHOUT_GRADIENT):
            torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=3e-4, msg=name)


# ---- several processes


def two_processes(path: Path, out: Path, stops: Sequence[int | None]) -> list[int | None]:
    """Returns the exit statuses of two processes that train together, started from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_training", "mpq.training.run", "torch._dynamo"])
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    running = [
        context.Process(target=train_as_process, args=(rank, store.port, path, out, stops[rank])) for rank in range(2)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(600)  # a loaded machine is slow
    return [process.exitcode for process in running]


def assert_close_trainings(out: Path, other: Path) -> None:
    found, expected = updates(out), updates(other)
    assert len(found) == len(expected) >= 4
    for one, two in zip(found, expected, strict=True):
        for key in ("loss", "ctc", "attention"):
            assert one[key] == pytest.approx(two[key], rel=1e-5), (one, two)
        assert one["norm"] == pytest.approx(two["norm"], rel=1e-3)
    state, same = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert state.keys() == same.keys()
    for name, tensor in state.items():
        if not name.endswith(WITHOUT_GRADIENT):
            torch.testing.assert_close(tensor, same[name], rtol=1e-4, atol=1e-4, msg=name)
    results = [TrainingResult.load(one / "training.json") for one in (out, other)]
    assert (results[0].processes, results[1].processes) == (2, 1)
    for one, two in zip(results[0].epochs, results[1].epochs, strict=True):
        assert one.dev_loss == pytest.approx(two.dev_loss, rel=1e-3)  # that bias has moved since the running mean


@pytest.fixture(scope="module")
def steady(speech: Path) -> Recipe:
    """A recipe without dropout, whose batches have two utterances or more."""
    result = recipe(speech, train__epochs=2)
    seconds = [0.2 * len(text) for text in TEXTS]
    for epoch in range(2):
        plans = [plan_epoch(seconds, 0.01, result.train.batch_frames, 0, epoch, least) for least in (1, 2)]
        assert plans[0] == plans[1] and min(map(len, plans[0])) >= 2 and len(plans[0]) >= 3
    return result


def test_torchrun_has_the_losses_of_one_process(steady: Recipe, speech: Path, tmp_path: Path) -> None:
    path = write_recipe(speech / "two.toml", train__epochs=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mpq"]
    command += ["train", str(path), "--out", str(tmp_path / "two"), "--json", "--quiet"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2  # printed once
    train(steady, tmp_path / "one", quiet=True)
    assert_close_trainings(tmp_path / "two", tmp_path / "one")


def test_two_processes_stop_together_and_go_on(steady: Recipe, speech: Path, tmp_path: Path) -> None:
    """Only one of them is asked to stop; several batches make an update."""
    path = write_recipe(speech / "accumulated.toml", train__epochs=2, train__accumulate=2)
    out = tmp_path / "two"
    assert two_processes(path, out, (None, 2)) == [130, 130]
    assert len(updates(out)) == 3 and torch.load(out / "state.pt", weights_only=True)["step"] == 3
    assert two_processes(path, out, (None, None)) == [0, 0]
    train(with_options(steady, accumulate=2), tmp_path / "one", quiet=True)
    assert_close_trainings(out, tmp_path / "one")


def test_accumulated_batches_are_one_large_batch(speech: Path, tmp_path: Path) -> None:
    """With layer_norm: batch normalisation sees each batch on its own."""
    plain = PLAIN | {"model__conv_norm": "layer_norm", "train__epochs": 3}
    small = recipe(speech, **plain, train__batch_frames=400, train__accumulate=10)
    large = recipe(speech, **plain, train__batch_frames=10000)
    for name, one in (("small", small), ("large", large)):
        train(one, tmp_path / name, quiet=True)
    found, expected = updates(tmp_path / "small"), updates(tmp_path / "large")
    assert len(found) == len(expected) == 3
    for one, two in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["norm"] == pytest.approx(two["norm"], rel=1e-4)


# ---- a loss that is not finite


def plant(patch: pytest.MonkeyPatch, token_count: int, kind: str, epoch_calls: int = 0) -> None:
    """Spoils the loss, or only its gradient, of the utterances with so many tokens, after some calls."""
    forward, calls = JointLoss.forward, 0

    def spoilt(self: JointLoss, features: torch.Tensor, lengths: torch.Tensor, targets: Targets) -> Any:
        nonlocal calls
        calls += self.training
        found = forward(self, features, lengths, targets)
        rows = (targets.lengths == token_count) & (calls > epoch_calls)
        if not rows.any():
            return found
        if kind == "gradient":
            zero = next(self.parameters()).sum() * 0  # whose square root has an infinite slope
            return found | {"ctc": found["ctc"] + torch.where(rows, zero.sqrt(), 0.0)}
        return found | {"ctc": torch.where(rows, float(kind), found["ctc"])}

    patch.setattr(JointLoss, "forward", spoilt)


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_a_loss_that_is_not_finite_names_the_utterance(
    kind: str, speech: Path, dropping: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only "bed cab" has 7 tokens; the state before is kept, and trained on once the fault is gone."""
    changed = with_options(dropping, save_minutes=1e-9)
    steps = len(plan_epoch([0.2 * len(text) for text in TEXTS], 0.01, 400, 0, 0))
    with monkeypatch.context() as patch:
        plant(patch, 7, kind, steps)
        with pytest.raises(MpqError) as error:
            train(changed, tmp_path, quiet=True)
    text = str(error.value)
    assert re.match(r"epoch 2, update \d+, batch of \d utterances: .* not finite; utterances \"train-7\" ", text)
    assert "train.jsonl:8" in text and text.count("train-") == 1 and "\n" not in text
    assert int(re.search(r"update (\d+)", text)[1]) == len(updates(tmp_path)) + 1 > steps
    assert all(np.isfinite(line["loss"]) for line in updates(tmp_path))


@pytest.mark.parametrize("accumulate", [1, 10])
def test_a_gradient_that_is_not_finite_names_the_utterances_of_the_update(
    accumulate: int, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, 7, "gradient")
    with pytest.raises(MpqError) as error:
        train(recipe(speech, train__accumulate=accumulate), tmp_path, quiet=True)
    text = str(error.value)
    assert re.match(r"gradient of epoch 1, update \d+: the loss or its gradient is not finite; utterances ", text)
    assert '"train-7"' in text or (accumulate == 10 and "and 5 more" in text)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_overflow_in_float16_skips_the_update(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes no number that JSON does not have."""
    plant(monkeypatch, 7, "gradient")
    options = {"train__precision": "float16", "train__epochs": 1, "train__average": 1}
    train(recipe(speech, **options), tmp_path, quiet=True)
    lines = [json.loads(line, parse_constant=reject) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [("norm" in line) for line in lines if "rate" in line].count(False) == 1
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model.safetensors").values())


def reject(constant: str) -> None:
    raise ValueError(constant)


# ---- options


def test_bfloat16_has_nearly_the_losses_of_float32(dropping: Recipe, whole: Path, tmp_path: Path) -> None:
    train(with_options(dropping, precision="bfloat16"), tmp_path, quiet=True)
    found, expected = updates(tmp_path), updates(whole)
    assert [one["loss"] for one in found[:4]] == pytest.approx([one["loss"] for one in expected[:4]], rel=0.03)
    assert [one["loss"] for one in found] != [one["loss"] for one in expected]
    assert load_file(tmp_path / "model.safetensors")["ctc.weight"].dtype == torch.float32


def test_unreadable_audio_is_named_by_the_reader_process_too(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_speech(tmp_path)
    options = recipe(tmp_path, **PLAIN, data__dev=None, train__select="last", train__workers=1)
    read = BatchReader.read

    def removing(*arguments: Any) -> Any:
        (tmp_path / "train-3.wav").unlink(missing_ok=True)
        return read(*arguments)

    monkeypatch.setattr(BatchReader, "read", removing)
    with pytest.raises(MpqError, match=r"train-3\.wav: no such file"):
        train(options, tmp_path / "out", quiet=True)
