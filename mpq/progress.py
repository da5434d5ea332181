"""The progress of long work: the library reports it here, and the program that uses the library shows it.

Nothing is shown unless that program says how; the command line shows a bar (`mpq.cli.messages`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Advance = Callable[[float], None]
"""A function that is told how much more is done."""
Display = Callable[[str, float, str], AbstractContextManager[Advance]]
"""A function of description, total and unit that shows the progress within a block."""

_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def progress_shown_by(display: Display) -> Iterator[None]:
    """Has a display show the progress of all work within the block."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def progress(description: str, total: float, quiet: bool = False, unit: str = "") -> Iterator[Advance]:
    """Yields a function to call with each amount of work that is done.

    Args:
        description: The name of the work.
        total: The amount of work.
        quiet: Show nothing.
        unit: The unit of `total`.
    """
    display = _display.get()
    if display is None or quiet or not total:
        yield lambda amount: None
    else:
        with display(description, total, unit) as advance:
            yield advance
