"""The documentation holds: examples run, links lead somewhere, the tree is the code's, printed commands exist."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from tiny_data import noisy_tone

from mpq.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")])
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "mpq").rglob("*.py") if not path.name.startswith("__"))


def test_examples_in_docstrings() -> None:
    attempted = 0
    for path in MODULES:
        result = doctest.testmod(importlib.import_module(".".join(path.with_suffix("").parts)))
        assert result.failed == 0, path
        attempted += result.attempted
    assert attempted >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_tree_is_that_of_the_code() -> None:
    """docs/architecture.md has a line for each module, and none for a module that is not there."""
    described, folder = set(), ""
    for indent, name in re.findall(r"^( {2}| {4})([\w/.]+)  +\S", (ROOT / "docs/architecture.md").read_text(), re.M):
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            described.add(Path("mpq", folder if len(indent) == 4 else "", name))
    assert described == set(MODULES)


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_snippet_of_the_readme_runs(
    tiny_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert (
        CliRunner().invoke(main, ["pack", str(tiny_archive), "--bits", "8", "--out", "small.safetensors"]).exit_code
        == 0
    )
    soundfile.write("speech.flac", noisy_tone(np.random.default_rng(0), 1.0, 300, 0.3), 16000)
    exec(snippet, {})
    assert re.fullmatch(r"\[('.*'|\".*\")\]", capsys.readouterr().out.strip())


def test_printed_commands_exist() -> None:
    """Every `mpq ...` line of a page parses: command and options are real."""
    found = 0
    for page in [*PAGES, *sorted((ROOT / "recipes").rglob("*.sh"))]:
        for line in re.findall(r"^(?:\$ )?mpq (\w+ .*)$", page.read_text(), re.MULTILINE):
            line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)  # the shell's ${NAME:-default}
            name, *arguments = shlex.split(line, comments=True)
            command = main.commands[name]
            command.make_context(name, arguments)
            found += 1
    assert found >= 12
