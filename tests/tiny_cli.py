"""The command line as a user runs it."""

import json

from click.testing import CliRunner, Result

from mpq.cli.main import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def result_json(*arguments: object) -> dict:
    done = run(*arguments, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fails(*arguments: object, words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.startswith("Usage: ") or done.stderr.count("\n") == 1, done.stderr
