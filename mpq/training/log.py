"""The log of a training: `log.jsonl` (a line for each update and epoch), TensorBoard if asked for, and messages."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.training.record import EpochResult

_log = logging.getLogger(__name__)


class TrainingLog:
    """The log of one training.

    Args:
        out: The checkpoint folder.
        epochs: The number of epochs planned.
        is_writing: Whether this process writes.
        quiet: Log no messages.
        tensorboard: Whether TensorBoard's files are written too.
    """

    def __init__(self, out: Path, epochs: int, is_writing: bool, quiet: bool, tensorboard: bool) -> None:
        self.path, self.epochs, self.is_writing, self.quiet = out / "log.jsonl", epochs, is_writing, quiet
        self.tensorboard = tensorboard and is_writing
        self._board: Any = None

    @contextmanager
    def opened(self, size: int, step: int) -> Iterator[None]:
        """Drops what an interrupted run wrote after its last saved state: `size` bytes and `step` updates stay.

        Raises:
            MpqError: TensorBoard is asked for and not installed.
        """
        if self.is_writing and self.path.exists():
            os.truncate(self.path, min(size, self.path.stat().st_size))
        if not self.tensorboard:
            yield
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MpqError("train.tensorboard: tensorboard is not installed; install mpq[tensorboard]") from None
        with SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1) as self._board:
            yield

    def add_update(self, step: int, epoch: int, record: Mapping[str, float]) -> int:
        """Writes an update's losses; returns the size of the log."""
        if self._board:
            for key, value in record.items():
                self._board.add_scalar(f"train/{key}", value, step)
        return self._write({"step": step, "epoch": epoch} | dict(record))

    def add_epoch(self, done: EpochResult, more: Mapping[str, Any] | None = None) -> int:
        """Writes and logs an epoch's result, and writes what else there is to say; returns the size of the log."""
        dev = ""
        for name, value, text in (
            ("loss", done.dev_loss, f"dev {done.dev_loss or 0:.3g}"),
            ("wer", done.dev_wer, f"WER {100 * (done.dev_wer or 0):.2f}%"),
        ):
            if value is not None:
                dev += f", {text}"
                if self._board:
                    self._board.add_scalar(f"dev/{name}", value, done.step)
        if not self.quiet:
            loss = "starting weights" if done.train_loss is None else f"loss {done.train_loss:.3f}"
            _log.info(f"epoch {done.epoch}/{self.epochs}: {loss}{dev}; {done.step} updates, {done.seconds:.0f} s")
        return self._write(asdict(done) | dict(more or {}))

    def _write(self, entry: dict[str, Any]) -> int:
        if not self.is_writing:
            return 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                return file.tell()
        except OSError as error:
            raise MpqError(f"{self.path}: cannot be written: {error.strerror}") from error
