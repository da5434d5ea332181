"""Where and how the work runs: device, several processes, progress on stderr."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mpq.errors import MpqError

_SECONDS_BETWEEN_LINES = 30


def choose_device(name: str) -> torch.device:
    """Returns the device that "auto", "cpu", "cuda" or "cuda:N" names; under torchrun "auto" and "cuda" are one each.

    Raises:
        MpqError: Another name, or a CUDA device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,4}", name):
        raise MpqError(f"--device: expected auto, cpu or cuda[:N], got {name!r}")
    if name != "cpu":
        if int(name.removeprefix("cuda:")) >= torch.cuda.device_count():
            raise MpqError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are here; use --device cpu")
        torch.backends.cudnn.allow_tf32 = False  # its 10-bit products would drown small divergences
    return torch.device(name)


@dataclass(frozen=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: This one's number, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """Yields the processes that `torchrun` started (gloo), or the one that there is without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # other launchers set RANK and WORLD_SIZE for their own ends
        yield Processes()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turns torch's failures to get memory into an error that says what needed it.

    Raises:
        MpqError: The block ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "memory" not in str(error):
            raise
        raise MpqError(f"{what}: not enough memory; cut long recordings into shorter ones") from error


@contextmanager
def progress(description: str, total: float, quiet: bool = False, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Yields a function that is told how much more is done; shows a bar with the time left, on stderr.

    Where stderr is no terminal, a line is printed every 30 seconds instead.

    Args:
        description: What is being done.
        total: How much there is to do.
        quiet: Show nothing.
        unit: Of `total`.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not total:
        yield lambda amount: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=False),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=round(total))
            yield lambda amount: bar.advance(task, amount)
    else:
        yield _lines(description, total, unit)


def _lines(description: str, total: float, unit: str) -> Callable[[float], None]:
    done, start = 0.0, time.monotonic()
    last = start

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / done * (total - done) if done else float("nan")
            print(f"{description}: {done:.0f}/{total:.0f} {unit}, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
