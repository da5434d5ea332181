"""A training that is interrupted anywhere ends as if it had not been."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_training import (
    CrashError,
    assert_same,
    dropping,
    environment,
    fails_at,
    recipe,
    some_always,
    speech,
    updates,
    whole,
    with_options,
    write_recipe,
)

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.training import objectives
from mpq.training import weights as weight_loop
from mpq.training.log import TrainingLog
from mpq.training.losses import JointLoss
from mpq.training.record import TrainingResult
from mpq.training.run import train

__all__ = ["dropping", "speech", "whole"]  # fixtures


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
    some_always(
        [*((point, 1e-9) for point in POINTS), ("inside an update", 10.0), ("between dev and the log", 10.0)],
        [("inside an update", 1e-9), ("between a candidate and the state", 1e-9), ("between dev and the log", 10.0)],
    ),
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


def test_no_candidate_is_removed_before_the_state_knows_why(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after an epoch that displaces the best one, and that scores worse when it is done again (as on a GPU)."""
    small = recipe(speech, train__average=1)
    scores = [(1.0, 0.5), (1.0, 0.4), (1.0, 0.9), (1.0, 0.9), (1.0, 0.9)]  # second epoch: first the best, then not
    monkeypatch.setattr(objectives, "held_out_errors", lambda *_: scores.pop(0))
    saves, save = [], weight_loop.WeightTrainer._save

    def killed(self: Any) -> None:
        saves.append(self.epoch)
        if self.epoch == 2 and saves.count(2) == 1:
            raise MemoryError("killed")
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(weight_loop.WeightTrainer, "_save", killed)
        with pytest.raises(MemoryError):
            train(small, tmp_path / "out", quiet=True)
    assert (tmp_path / "out/epochs/0001.safetensors").exists()
    assert train(small, tmp_path / "out", quiet=True).averaged == (1,)
