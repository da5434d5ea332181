"""What a command says on stderr while it works."""

import io
import logging
import signal
import sys
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from mpq.cli import messages
from mpq.cli.main import main
from mpq.cli.messages import remembered_interrupt, shown_on_stderr
from mpq.progress import progress

logger = logging.getLogger("mpq.some.module")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A command that says something and warns of something."""
    import click

    from mpq.cli.options import common_options

    @main.command("talk")
    @common_options
    def talk(**_: object) -> None:
        logger.info("half of it is done")
        logger.warning("the other half is missing")
        click.echo("result")

    yield "talk"
    del main.commands["talk"]


def called(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_messages_go_to_stderr_and_quiet_leaves_the_warnings(command: str) -> None:
    for options, lines in (
        ((), ["mpq: half of it is done", "mpq: the other half is missing"]),
        (("--quiet",), ["mpq: the other half is missing"]),
        ((), ["mpq: half of it is done", "mpq: the other half is missing"]),
    ):
        done = called(command, *options)
        assert done.exit_code == 0 and done.stdout == "result\n" and done.stderr.splitlines() == lines


def test_python_users_have_the_messages_of_logging_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("mpq").handlers[:], logging.getLogger("mpq").level
    called("--version")
    assert (logging.getLogger("mpq").handlers, logging.getLogger("mpq").level) == before
    logger.info("half of it is done")
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_message_stands_on_its_own_line_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_on_stderr(), progress("packing", 3, unit="layers") as advance:
        advance(1)
        logger.info("half of it is done")
        advance(2)
    text = terminal.getvalue()
    assert "packing" in text and "3/3" in text
    assert "\x1b[2Kmpq: half of it is done\n" in text  # where the bar was, which is cleared and drawn anew below


def test_where_there_is_no_terminal_a_line_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with shown_on_stderr(), progress("packing", 4, unit="layers") as advance:
        for _ in range(3):
            now[0] += 20
            advance(1)
    assert capsys.readouterr().err == "packing: 2/4 layers, 40 s left\n"
    assert messages._SECONDS_BETWEEN_LINES == 30


@pytest.mark.parametrize("becomes", [None, ImportError, RecursionError])
def test_an_interrupt_counts_whatever_becomes_of_its_exception(becomes: type[Exception] | None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), remembered_interrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as a module that is being imported may do
            if becomes:
                raise becomes from None
    assert signal.getsignal(signal.SIGINT) == before
