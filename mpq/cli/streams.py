"""Standard output as it may be: in an encoding that lacks characters, full, or closed.

Characters that stdout's encoding lacks become "?". A stdout that takes no more is a fault that the caller can mend, as
a full disk is: one line, exit status 2.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from mpq.errors import MpqError


@contextmanager
def open_streams() -> Iterator[None]:
    """Makes stdout take whatever text there is; at the end a stderr that takes no more is left alone.

    Raises:
        MpqError: stdout is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    if sys.stdout is None:
        raise MpqError("stdout is closed; send it to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _give_up(sys.stderr)


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Raises MpqError where what was printed within the block cannot be written."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # a file's
            raise
        try:
            print(flush=True)  # fails again if it was stdout that failed
        except OSError:
            _give_up(sys.stdout)
            reason = error.strerror or error
            raise MpqError(f"stdout: cannot be written: {reason}; what was printed is not whole") from None
        raise


def has_unicode() -> bool:
    """Returns whether stdout takes every character."""
    return (sys.stdout.encoding or "").lower().replace("_", "-").startswith("utf-")


def _give_up(stream: TextIO) -> None:
    """Sends a stream that takes no more to nowhere, so that Python does not fail on it at its end."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
