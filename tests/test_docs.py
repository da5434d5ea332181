"""The documentation holds: examples run, links lead somewhere, every file is described, printed commands exist."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

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


def test_every_module_is_described() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for path in MODULES:
        assert re.search(rf"\b{re.escape(path.name)}", text), path


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
