"""Recipes that are refused, and what the command line says of them."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_training import write_speech

from mpq.cli.main import main
from mpq.config import Recipe, sections

LEAKS = r"pydantic|Input should|should match|Config\b|constrained|function-|https?:|validation error|Field required"
WORKING = """
seed = 1
[data]
train = ["train.jsonl"]
dev = "dev.jsonl"
test = { one = "dev.jsonl" }

[allocate]
average_bits = 4
"""


def write(folder: Path, text: str) -> Path:
    (folder / "r.toml").write_text(text)
    return folder / "r.toml"


def faults(path: Path, *overrides: str, command: str = "run") -> list[str]:
    """Returns the lines of a refusal, without the recipe's name, as the command line prints them."""
    options = [part for text in overrides for part in ("--set", text)]
    before = sorted(path.parent.iterdir())
    options += ["--dry-run"] if command == "run" else []  # a fault that is missed should not start a training
    done = CliRunner().invoke(main, [command, str(path), "--out", str(path.parent / "out/deep"), *options])
    assert done.exit_code == 2 and done.stdout == "" and sorted(path.parent.iterdir()) == before, done.output
    lines = done.stderr.removeprefix("mpq: ").splitlines()
    assert len(set(lines)) == len(lines) and not re.search(LEAKS, done.stderr), done.stderr
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A recipe whose data are there."""
    write_speech(tmp_path)
    write_speech(tmp_path, name="dev.jsonl")
    return write(tmp_path, WORKING)


def known(section: str) -> str:
    return ", ".join((sections()[section] if section else Recipe).model_fields)


def assert_faults(good: Path, overrides: list[str], words: list[str]) -> None:
    """`mpq run` with these overrides is refused with lines that begin with these words, and no others."""
    found = faults(good, *overrides)
    assert len(found) == len(words), found
    for line, start in zip(sorted(found), sorted(words), strict=True):
        assert line.startswith(start)
