"""Messages of a running command on stderr: the library's log messages, and a bar with the time that is left."""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mpq.progress import Advance, progress_shown_by

_COMMANDS = {"mpq.pipeline.run": "mpq run", "mpq.search.phases": "mpq search"}
"""The first words of a message, by the module that logs it; other messages begin with "mpq"."""
_SECONDS_BETWEEN_LINES = 30
_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "give yourself the permission, or choose another place",
    errno.EPERM: "give yourself the permission, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "make room, and give the command again",
    errno.EDQUOT: "make room, and give the command again",
    errno.EPIPE: "its reader has gone",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


@contextmanager
def shown_on_stderr() -> Iterator[None]:
    """Shows messages and progress of the library within the block."""
    logger, handler = logging.getLogger("mpq"), _Stderr()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with progress_shown_by(_bar):
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def show_warnings_only() -> None:
    """Shows warnings only, until the end of the block of `shown_on_stderr`."""
    for handler in logging.getLogger("mpq").handlers:
        if isinstance(handler, _Stderr):
            handler.setLevel(logging.WARNING)


def say(line: str) -> None:
    """Prints a line on stderr; a stderr that takes no more is left alone, so that the work goes on."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def remembered_interrupt() -> Iterator[None]:
    """Ends the block in KeyboardInterrupt if SIGINT came within it, whatever became of the exception that it raised.

    Modules that are being imported, and destructors, turn it into an error of their own or swallow it.
    """
    came = False

    def interrupt(*_: Any) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if came:
            raise KeyboardInterrupt


def system_fault(error: OSError) -> str:
    """Returns what the system refused: where, why, and what to do."""
    where = "" if error.filename is None else f"{shortened(os.fsdecode(error.filename))}: "
    return f"{where}{error.strerror or error}; {_REMEDIES.get(error.errno or 0, 'mend that, and try again')}"


def shortened(text: str) -> str:
    """Returns a text that is too long for a line with its middle left out."""
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


class _Stderr(logging.Handler):
    """Prints each message as a line on the present `sys.stderr`, which rich replaces to put lines above its bar."""

    def emit(self, record: logging.LogRecord) -> None:
        command = _COMMANDS.get(record.name, "mpq")
        say(f"{command}: {self.format(record)}")


@contextmanager
def _bar(description: str, total: float, unit: str) -> Iterator[Advance]:
    """Yields a function that moves a bar; where stderr is no terminal, it prints a line every 30 seconds instead."""
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
    if not console.is_terminal:
        yield _lines(description, total, unit)
        return
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


def _lines(description: str, total: float, unit: str) -> Advance:
    done, start = 0.0, time.monotonic()
    last = start

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / done * (total - done) if done else float("nan")
            say(f"{description}: {done:.0f}/{total:.0f} {unit}, {left:.0f} s left")

    return advance
