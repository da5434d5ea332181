"""The start of the command line, before anything is imported that takes time."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line; Ctrl-C while it is imported ends in one line, too."""

    def leave(*_: Any) -> None:  # nothing is under way yet, and an exception in the midst of an import may get lost
        print("mpq: interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup and a shell's & ignore it
    if is_ours:
        signal.signal(signal.SIGINT, leave)
    from mpq.cli.main import main as cli

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli()
