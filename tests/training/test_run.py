"""Training: the same losses on two processes as on one, and after any interruption; faults that it names; results."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_training import (
    TEXTS,
    CrashError,
    fails_at,
    log_of,
    one_thread,
    recipe,
    train_as_process,
    write_recipe,
    write_speech,
)

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.scoring.metrics import measure
from mpq.speech.audio import pad_batch, read_audio
from mpq.speech.augment import generator, spec_mask
from mpq.speech.text import CharTokenizer
from mpq.training import objectives
from mpq.training import weights as weight_loop
from mpq.training.building import build_model
from mpq.training.data import BatchReader, plan_epoch
from mpq.training.log import TrainingLog
from mpq.training.losses import JointLoss, Targets
from mpq.training.orthogonal import constrained_factors, orthogonality_error
from mpq.training.record import EpochResult, TrainingResult, rank_epochs
from mpq.training.run import train

__all__ = ["one_thread"]  # a fixture

PLAIN = {
    "augment__speed": [1.0],
    "augment__noise": [],
    "augment__frequency_masks": 0,
    "augment__time_masks": 0,
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten utterances to train on and three held out."""
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder)
    write_speech(folder, ["abed", "dace", "a bee"], "dev.jsonl")
    return folder


@pytest.fixture(scope="module")
def dropping(speech: Path) -> Recipe:
    """A recipe with all that is drawn at random."""
    return recipe(speech, model__dropout=0.1)


@pytest.fixture(scope="module")
def whole(dropping: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of that recipe, trained without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(dropping, out, quiet=True)
    return out


def updates(out: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(out) if "rate" in line]


def with_options(recipe: Recipe, **options: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=options)})


def assert_same(out: Path, other: Path) -> None:
    """The same log but for the times, and the same model to the last bit."""
    assert log_of(out) == log_of(other)
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


# ---- the folder


def test_a_checkpoint_folder_has_what_it_should(whole: Path, dropping: Recipe) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "model.safetensors",
        "recipe.json",
        "log.jsonl",
        "training.json",
    }
    assert Recipe.model_validate_json((whole / "recipe.json").read_text()) == dropping
    log = log_of(whole)
    found = updates(whole)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1)) and len(found) >= 9
    assert [line["epoch"] for line in log if "dev_wer" in line] == [1, 2, 3]
    for line in found:
        assert line["loss"] == pytest.approx(0.2 * line["ctc"] + 0.8 * line["attention"], rel=1e-12)
        assert line["rate"] == pytest.approx(0.003 * min(line["step"] / 4, (4 / line["step"]) ** 0.5))
    result = TrainingResult.load(whole / "training.json")
    for done in result.epochs:
        losses = [line["loss"] for line in found if line["epoch"] == done.epoch]
        assert done.train_loss == pytest.approx(np.mean(losses), rel=1e-12)
        assert done.step == [line["step"] for line in found if line["epoch"] == done.epoch][-1]
    model = load_model(whole)
    assert result.parameters == model.parameter_counts() and not model.training
    assert (result.utterances, result.skipped, result.too_long, result.processes) == (10, 0, 0, 1)
    assert len(result.averaged) == 2


def test_dev_loss_and_wer_are_those_of_the_model(whole: Path, speech: Path) -> None:
    """One utterance at a time."""
    model, result = load_model(whole), TrainingResult.load(whole / "training.json")
    texts, hypotheses, total = ["abed", "dace", "a bee"], [], 0.0
    with torch.no_grad():
        for index, text in enumerate(texts):
            waveform = read_audio(speech / f"dev-{index}.wav", 8000)[None]
            length = torch.tensor([waveform.shape[1]])
            ctc, attention = JointLoss(model, 0.1)(
                *model.features(waveform, length), Targets.of([model.tokenizer.encode(text)])
            )
            total += 0.2 * float(ctc) / 13 + 0.8 * float(attention) / 16
            hypotheses += model.transcribe(waveform, length)
    assert result.dev_loss == pytest.approx(total, rel=1e-5)
    assert result.dev_wer == pytest.approx(measure(["0", "1", "2"], texts, hypotheses, [1.0] * 3).wer)


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
            ctc, attention = JointLoss(model, 0.1)(features, frames, Targets.of(texts))
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
        process.join(120)
    return [process.exitcode for process in running]


WITHOUT_GRADIENT = ("linear_k.bias", "linear_pos.weight", "depthwise_conv.bias", "batch_norm.running_mean")
"""The softmax and the batch normalisation take out what is the same everywhere: these biases, and the slowest sinusoids
of the positions. Their gradient is rounding noise, which Adam scales up; the running mean has such a bias in it."""


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


# ---- interruptions


POINTS = {
    "before the first update": (JointLoss, "forward", 1, False),
    "inside an update": (JointLoss, "forward", 6, False),
    "after an update, before its log": (TrainingLog, "add_update", 5, False),
    "after an update's log": (TrainingLog, "add_update", 5, True),
    "between the last update and dev": (objectives, "held_out_errors", 2, False),
    "between dev and the log": (TrainingLog, "add_epoch", 2, False),
    "between an epoch's log and its candidate": (weight_loop, "write_checkpoint", 2, False),
    "between a candidate and the state": (weight_loop, "write_checkpoint", 2, True),
    "before the model": (weight_loop, "write_checkpoint", 4, False),
    "between the model and the result": (weight_loop, "write_checkpoint", 4, True),
    "after the result": (weight_loop, "clean_up", 1, False),
}


@pytest.mark.parametrize(
    ("point", "save_minutes"),
    [*((point, 1e-9) for point in POINTS), ("inside an update", 10.0), ("between dev and the log", 10.0)],
)
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    point: str, save_minutes: float, dropping: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, out = with_options(dropping, save_minutes=save_minutes), tmp_path / "out"
    with monkeypatch.context() as patch:
        fails_at(*POINTS[point][:3], patch, POINTS[point][3])
        with pytest.raises(CrashError):
            train(changed, out, quiet=True)
    result = train(changed, out, quiet=True)
    assert_same(out, whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert result == TrainingResult.load(out / "training.json")


def test_a_state_that_was_cut_off_leaves_the_one_before(
    dropping: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, saved = tmp_path / "out", torch.save, []

    def cut(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        saved.append(state["step"])
        if len(saved) == 6:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise CrashError

    changed = with_options(dropping, save_minutes=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(CrashError):
            train(changed, out, quiet=True)
    assert torch.load(out / "state.pt", weights_only=True)["step"] == saved[-2]
    train(changed, out, quiet=True)
    assert_same(out, whole)


def test_many_interruptions_in_one_training(dropping: Recipe, whole: Path, tmp_path: Path) -> None:
    """SIGINT during every second update, as the command line sees it."""
    out, count = tmp_path / "out", 0
    path = write_recipe(Path(dropping.data.root) / "many.toml", model__dropout=0.1)
    update = weight_loop.WeightTrainer._update

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self, *arguments)

    statuses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_loop.WeightTrainer, "_update", interrupted)
        while not statuses or statuses[-1] == 130:
            count = 0
            done = CliRunner().invoke(main, ["train", str(path), "--out", str(out), "--quiet"])
            statuses.append(done.exit_code)
            assert "the state is saved after this update" in done.stderr or done.exit_code == 0
    assert statuses == [130] * (len(updates(whole)) // 2) + [0]
    assert_same(out, whole)


WAITS = """
import os, signal, sys
from mpq.cli.main import main
from mpq.training.log import TrainingLog

read, write = os.pipe()
os.set_blocking(write, False)
signal.set_wakeup_fd(write)
add_update = TrainingLog.add_update
def waiting(self, step, *arguments):
    size = add_update(self, step, *arguments)
    if step == 5:
        print("ready", flush=True)
        os.read(read, 1)  # until a signal has come
    return size
TrainingLog.add_update = waiting
sys.argv = ["mpq", "train", "{recipe}", "--out", "{out}"]
sys.argv += ["--set", "train.workers=1", "--set", "train.save_minutes=1e-9"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill(number: int, dropping: Recipe, whole: Path, tmp_path: Path) -> None:
    """Of the whole process group, the process that reads the audio included; which changes no loss."""
    path = write_recipe(Path(dropping.data.root) / "killed.toml", model__dropout=0.1)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(recipe=path, out=out)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), errors
    if number == signal.SIGINT:
        lines = [line for line in errors.splitlines() if line.startswith("mpq:") and "epoch" not in line]
        assert lines == [
            "mpq: the state is saved after this update",
            "mpq: interrupted; the same command goes on where it stopped",
        ]
        assert len(updates(out)) == 6
        assert torch.load(out / "state.pt", weights_only=True)["step"] == 6
    train(dropping, out, quiet=True)
    assert_same(out, whole)


def test_a_finished_training_is_not_done_again(whole: Path, dropping: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    fails_at(JointLoss, "forward", 1, monkeypatch)
    assert train(dropping, whole, quiet=True) == TrainingResult.load(whole / "training.json")
    assert before == {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}


def test_a_spoilt_state_is_refused(dropping: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(objectives, "held_out_errors", 2, monkeypatch)
    with pytest.raises(CrashError):
        train(dropping, tmp_path, quiet=True)
    state = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(MpqError, match=r"state\.pt: cannot be read .*; delete the folder to begin anew"):
        train(dropping, tmp_path, quiet=True)


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_training_in_the_same_folder_is_refused(
    is_finished: bool, speech: Path, dropping: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole
    if not is_finished:
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            fails_at(objectives, "held_out_errors", 2, patch)
            with pytest.raises(CrashError):
                train(dropping, out, quiet=True)
    word = "a finished" if is_finished else "an unfinished"
    write_speech(tmp_path, [*TEXTS[:-1], "abba"])  # another transcript
    write_speech(tmp_path, ["abed", "dace", "a bee"], "dev.jsonl")
    write_speech(tmp_path / "longer", seconds=0.17)
    write_speech(tmp_path / "longer", ["abed", "dace", "a bee"], "dev.jsonl")
    write_speech(speech, ["abed", "dace", "a bed"], "other.jsonl")
    others = [
        with_options(dropping, learning_rate=0.004),
        with_options(dropping, epochs=4),
        dropping.model_copy(update={"seed": 1}),
        dropping.model_copy(update={"model": dropping.model.model_copy(update={"dropout": 0.2})}),
        dropping.model_copy(update={"augment": dropping.augment.model_copy(update={"speed": [1.0]})}),
        recipe(tmp_path, model__dropout=0.1),
        recipe(tmp_path / "longer", model__dropout=0.1),
        recipe(speech, model__dropout=0.1, data__dev="other.jsonl"),
    ]
    for other in others:
        with pytest.raises(MpqError, match=f"holds {word} training with other options or data"):
            train(other, out, quiet=True)
    neutral = with_options(dropping, workers=1, save_minutes=3.0, tensorboard=False)
    if is_finished:
        assert train(neutral, out, quiet=True).fingerprint == TrainingResult.load(out / "training.json").fingerprint
    else:
        train(neutral, out, quiet=True)
        assert_same(out, whole)


# ---- a loss that is not finite


def plant(patch: pytest.MonkeyPatch, token_count: int, kind: str, epoch_calls: int = 0) -> None:
    """Spoils the loss, or only its gradient, of the utterances with so many tokens, after some calls."""
    forward, calls = JointLoss.forward, 0

    def spoilt(self: JointLoss, features: torch.Tensor, lengths: torch.Tensor, targets: Targets) -> Any:
        nonlocal calls
        calls += self.training
        ctc, attention = forward(self, features, lengths, targets)
        rows = (targets.lengths == token_count) & (calls > epoch_calls)
        if not rows.any():
            return ctc, attention
        if kind == "gradient":
            zero = next(self.parameters()).sum() * 0  # whose square root has an infinite slope
            return ctc + torch.where(rows, zero.sqrt(), 0.0), attention
        return torch.where(rows, float(kind), ctc), attention

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


# ---- which epochs


def held_out(patch: pytest.MonkeyPatch, *results: tuple[float, float]) -> None:
    """Lets dev have these losses and WERs, one after the other, then the last again and again."""
    left = list(results)
    patch.setattr(objectives, "held_out_errors", lambda *_: left.pop(0) if len(left) > 1 else left[0])


def keep_weights(patch: pytest.MonkeyPatch) -> dict[int, dict[str, np.ndarray]]:
    """Returns what will have the weights of every epoch, whatever becomes of the files."""
    kept: dict[int, dict[str, np.ndarray]] = {}
    keep = weight_loop.WeightTrainer._write_candidate

    def keeping(self: Any) -> list[int]:
        state = self.model.state_dict()
        kept[self.epochs[-1].epoch] = {name: one.double().numpy().copy() for name, one in state.items()}
        return keep(self)

    patch.setattr(weight_loop.WeightTrainer, "_write_candidate", keeping)
    return kept


def assert_mean(out: Path, states: Sequence[dict[str, np.ndarray]]) -> None:
    for name, tensor in load_file(out / "model.safetensors").items():
        if name != "tokenizer":
            expected = np.mean([state[name] for state in states], axis=0)
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("select", "results", "expected"),
    [
        ("wer", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.3), (9, 0.3)], (2, 3)),
        ("wer", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.31), (9, 0.3)], (2,)),
        ("wer", [(4, 0.3), (3, 0.3), (2, 0.3), (1, 0.4), (9, 0.2), (9, 0.3)], (2, 3)),
        ("loss", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (1, 0.9), (1, 0.3)], (1, 2)),
        ("loss", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (1.1, 0.1), (1, 0.3)], (1,)),
        ("last", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.3), (9, 0.6)], (3, 4)),
    ],
)
def test_which_epochs_are_averaged(
    select: str,
    results: list[tuple[float, float]],
    expected: tuple[int, ...],
    speech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four epochs, then the average and the best one alone, which takes its place where it is better on dev."""
    held_out(monkeypatch, *results)
    kept = keep_weights(monkeypatch)
    result = train(
        recipe(speech, **PLAIN, train__epochs=4, train__select=select, train__batch_frames=4000), tmp_path, quiet=True
    )
    assert result.averaged == expected
    assert (result.dev_loss, result.dev_wer) == results[4 if len(expected) == 2 else 5]
    assert len(kept) == 4
    assert_mean(tmp_path, [kept[epoch] for epoch in expected])


def test_without_dev_the_last_epochs_are_averaged(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep_weights(monkeypatch)
    options = PLAIN | {"data__dev": None, "train__select": "last", "train__batch_frames": 4000}
    result = train(recipe(speech, **options, train__epochs=3, train__average=5), tmp_path, quiet=True)
    assert result.averaged == (1, 2, 3) and result.dev_loss is result.dev_wer is None
    assert_mean(tmp_path, list(kept.values()))


def test_patience(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch 2 is the best (3 has its WER and a higher loss); it is waited for two more."""
    held_out(monkeypatch, (1, 0.5), (2, 0.4), (2.1, 0.4), (1, 0.45), (1, 0.1))
    result = train(
        recipe(speech, **PLAIN, train__epochs=9, train__patience=2, train__batch_frames=4000), tmp_path, quiet=True
    )
    assert len(result.epochs) == 4


def test_patience_holds_after_an_interruption(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = recipe(speech, **PLAIN, train__epochs=9, train__patience=1, train__batch_frames=4000)
    held_out(monkeypatch, (1, 0.4), (2, 0.5), (3, 0.1))
    with monkeypatch.context() as patch:
        fails_at(weight_loop, "write_checkpoint", 3, patch)  # the model, after epochs 1 and 2
        with pytest.raises(CrashError):
            train(options, tmp_path, quiet=True)
    assert len(train(options, tmp_path, quiet=True).epochs) == 2


def test_ranks() -> None:
    epochs = [
        EpochResult(index + 1, 0, 0.0, loss, wer, 0.0) for index, (loss, wer) in enumerate([(3, 1), (1, 2), (1, 1)])
    ]
    assert [one.epoch for one in rank_epochs(epochs, "wer")] == [3, 1, 2]
    assert [one.epoch for one in rank_epochs(epochs, "loss")] == [2, 3, 1]
    assert [one.epoch for one in rank_epochs(epochs, "last")] == [3, 2, 1]


# ---- options


def test_a_reader_process_and_tensorboard_change_no_loss(dropping: Recipe, whole: Path, tmp_path: Path) -> None:
    train(with_options(dropping, workers=1, tensorboard=True), tmp_path, quiet=True)
    assert_same(tmp_path, whole)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [event.value for event in board.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in updates(whole)])
    assert [event.step for event in board.Scalars("dev/wer")] == [
        one.step for one in TrainingResult.load(whole / "training.json").epochs
    ]


def test_bfloat16_has_nearly_the_losses_of_float32(dropping: Recipe, whole: Path, tmp_path: Path) -> None:
    train(with_options(dropping, precision="bfloat16"), tmp_path, quiet=True)
    found, expected = updates(tmp_path), updates(whole)
    assert [one["loss"] for one in found[:4]] == pytest.approx([one["loss"] for one in expected[:4]], rel=0.03)
    assert [one["loss"] for one in found] != [one["loss"] for one in expected]
    assert load_file(tmp_path / "model.safetensors")["ctc.weight"].dtype == torch.float32


def test_semi_orthogonal_factors(speech: Path, tmp_path: Path) -> None:
    options = PLAIN | {"model__ffn_rank": 6, "train__semi_orthogonal": "SLLS", "train__semi_orthogonal_every": 1}
    train(recipe(speech, **options, train__epochs=6, train__average=1), tmp_path, quiet=True)
    encoder = load_model(tmp_path).encoder
    assert all(orthogonality_error(factor.detach()) < 0.1 for factor in constrained_factors(encoder, "SLLS"))
    assert all(orthogonality_error(factor.detach()) > 0.2 for factor in constrained_factors(encoder, "LSSL"))


def test_semi_orthogonal_steps_are_taken_at_the_updates_that_the_recipe_says(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.Size] = []
    monkeypatch.setattr(weight_loop, "semi_orthogonal_step", lambda factor: taken.append(factor.shape))
    options = {"model__ffn_rank": 6, "train__semi_orthogonal": "SLLL", "train__semi_orthogonal_every": 4}
    train(recipe(speech, **options), tmp_path, quiet=True)
    assert taken == [(6, 16)] * 2 * (len(updates(tmp_path)) // 4)


def test_a_model_without_decoder_is_trained_on_the_ctc_alone(speech: Path, tmp_path: Path) -> None:
    options = recipe(speech, model__decoder_layers=0, train__ctc_weight=1.0)
    result = train(options, tmp_path, quiet=True)
    assert all(line["loss"] == line["ctc"] and "attention" not in line for line in updates(tmp_path))
    assert load_model(tmp_path).decoder is None and result.dev_loss > 0


def test_words_and_bpe(speech: Path, tmp_path: Path) -> None:
    one = {"train__epochs": 1, "train__average": 1}
    train(recipe(speech, **one, tokens__type="bpe", tokens__vocabulary_size=9), tmp_path / "bpe", quiet=True)
    assert len(load_model(tmp_path / "bpe").tokenizer.pieces) == 9
    words = recipe(speech, **one, tokens__type="words", data__dev="train.jsonl")
    train(words, tmp_path / "words", quiet=True)
    assert load_model(tmp_path / "words").tokenizer.pieces == tuple(sorted({word for t in TEXTS for word in t.split()}))
    with pytest.raises(MpqError, match=r'dev\.jsonl:1.*"dace"|abed'):
        train(recipe(speech, **one, tokens__type="words"), tmp_path / "unknown", quiet=True)


def test_a_folder_that_cannot_be_made(speech: Path, dropping: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MpqError, match="the folder cannot be made"):
        train(dropping, tmp_path / "file" / "out", quiet=True)


# ---- it learns


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten utterances, learned by heart: a folder with train.jsonl and the checkpoint `out`."""
    folder = tmp_path_factory.mktemp("learned")
    write_speech(folder)
    options = PLAIN | {
        "data__dev": None,
        "model__width": 32,
        "model__ffn_width": 64,
        "model__subsampling_channels": 8,
        "model__decoder_ffn_width": 64,
        "train__select": "last",
        "train__average": 1,
        "train__epochs": 90,
        "train__batch_frames": 1200,
        "train__learning_rate": 0.005,
        "train__warmup_steps": 20,
        "train__schedule": "cosine",
        "train__ctc_weight": 0.3,
    }
    train(recipe(folder, **options), folder / "out", quiet=True)
    return folder


@pytest.mark.parametrize("method", ["greedy", "prefix", "joint"])
def test_ten_utterances_are_learned_by_heart(method: str, learned: Path, tmp_path: Path) -> None:
    """Whatever the decoder, and however the utterances are put into batches."""
    transcripts = []
    for seconds in (60, 2, 0.5):
        out = tmp_path / str(seconds)
        command = ["evaluate", learned / "out", "--data", learned / "train.jsonl", "--out", out, "--decode", method]
        done = CliRunner().invoke(main, [*map(str, command), "--batch-seconds", str(seconds), "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["wer"] == 0
        transcripts.append((out / "hyp.trn").read_text())
    assert transcripts == [transcripts[0]] * 3
    assert transcripts[0].splitlines() == [f"{text} (train-{index})" for index, text in enumerate(TEXTS)]


@pytest.mark.parametrize("method", ["greedy", "prefix", "joint"])
def test_transcripts_of_an_untrained_model_do_not_depend_on_the_batch(
    method: str, whole: Path, speech: Path, tmp_path: Path
) -> None:
    """A model that is sure of nothing would show the slightest influence."""
    found = []
    for seconds in (60, 3, 0.5):
        command = ["evaluate", whole, "--data", speech / "train.jsonl", "--out", tmp_path / str(seconds)]
        done = CliRunner().invoke(
            main, [*map(str, command), "--decode", method, "--batch-seconds", str(seconds), "--quiet"]
        )
        assert done.exit_code == 0, done.output
        found.append((tmp_path / str(seconds) / "hyp.trn").read_text())
    assert found == [found[0]] * 3


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
