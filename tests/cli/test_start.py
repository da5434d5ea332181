"""The start of the command line."""

import subprocess
import sys


def test_ctrl_c_while_the_commands_are_imported_is_one_line() -> None:
    code = """
import signal, sys
from mpq.cli.start import main
class Interrupting:
    def find_spec(self, name, *_):
        if name == "mpq.cli.compress": signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "mpq: interrupted\n")
