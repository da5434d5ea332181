"""The log of a training: its files, TensorBoard and messages."""

import logging
from pathlib import Path

import pytest
from tiny_training import assert_same, dropping, log_of, speech, updates, whole, with_options

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.training.log import TrainingLog
from mpq.training.record import EpochResult, TrainingResult
from mpq.training.run import train

__all__ = ["dropping", "speech", "whole"]  # fixtures


def test_a_log_that_is_shorter_than_the_state_says_gets_no_zeros(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    log = TrainingLog(tmp_path, 1, is_writing=True, quiet=True, tensorboard=False)
    with log.opened(size=500, step=40):
        log.add_update(41, 1, {"loss": 1.0})
    assert [line.get("step") for line in log_of(tmp_path)] == [1, 41]


def test_a_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = TrainingLog(tmp_path, 1, is_writing=True, quiet=True, tensorboard=False)
    with pytest.raises(MpqError, match=r"log\.jsonl: cannot be written: No space left on device"):
        log.add_update(1, 1, {"loss": 1.0})


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


@pytest.mark.parametrize("quiet", [False, True])
def test_epochs_are_told(quiet: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mpq")
    log = TrainingLog(tmp_path, 3, is_writing=True, quiet=quiet, tensorboard=False)
    log.add_epoch(EpochResult(0, 0, None, 0.0428, None, 0.0))
    log.add_epoch(EpochResult(1, 12, 0.1234, 0.25, 0.125, 61.7))
    expected = [
        "epoch 0/3: starting weights, dev 0.0428; 0 updates, 0 s",
        "epoch 1/3: loss 0.123, dev 0.25, WER 12.50%; 12 updates, 62 s",
    ]
    assert caplog.messages == ([] if quiet else expected)
