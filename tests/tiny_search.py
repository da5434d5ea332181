"""Recipes of tiny searches, and what is the same about two of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_finetune import write_hybrid
from tiny_training import write_recipe, write_speech

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.pipeline.read import load_recipe
from mpq.search.record import SearchResult
from mpq.search.run import search

SEARCH = {
    "model__dropout": 0.1,
    "search__ffn_width": [4, 12, 32],
    "search__eta": 50.0,
    "search__epochs": 3,
    "search__supernet_epochs": 2,
    "search__final_epochs": 2,
}


def write_search(path: Path, **changes: Any) -> Path:
    return write_recipe(path, **(SEARCH | changes))


def search_recipe(folder: Path, **changes: Any) -> Recipe:
    """Returns the recipe for a folder that has the data."""
    seed = changes.pop("seed", 0)
    return load_recipe(write_search(folder / "recipe.toml", **changes), [f"seed={seed}"], stages=["search"])


FROM = {"model__dropout": 0.0, "search__supernet_epochs": 1, "search__epochs": 2, "search__final_epochs": 1}


def from_checkpoint(speech: Path, path: Path, **changes: Any) -> Recipe:
    """Returns a recipe of a short search that begins with a trained model."""
    written = write_search(speech / "from.toml", **(FROM | changes))
    return load_recipe(written, [f"checkpoint={path}"], stages=["search"])


def run(recipe: Recipe, out: Path) -> SearchResult:
    return search(recipe, out, device="cpu", quiet=True)


def stripped(value: Any) -> Any:
    """Returns JSON without times and the search's own paths."""
    if isinstance(value, dict):
        dropped = ("seconds", "supernet", "supernet_seconds")
        return {key: stripped(one) for key, one in value.items() if key not in dropped}
    return [stripped(one) for one in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, Any]:
    """Returns what each file of a folder has, times and how often to save aside."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name.endswith(".jsonl"):
            found[name] = [stripped(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name.endswith(".json"):
            found[name] = None if path.name == "recipe.json" else stripped(json.loads(path.read_text()))
        elif path.is_file():
            text = path.read_bytes()
            found[name] = text.replace(b"save_minutes = 1e-09\n", b"") if name == "recipe.toml" else text
    return found


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, dev.jsonl, other.jsonl and the checkpoint `hybrid`."""
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder)
    write_speech(folder, ["abed", "dace", "a bee"], "dev.jsonl")
    write_speech(folder, ["bead", "cab", "deed", "a bed"], "other.jsonl")
    write_hybrid(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(speech: Path) -> Recipe:
    return search_recipe(speech)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that recipe's search, without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(recipe, out)
    return out


@pytest.fixture(scope="module")
def supernet(whole: Path) -> str:
    return str(whole / "supernet")


def command(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["search", *map(str, arguments), "--quiet"])


def refusal(*arguments: object) -> str:
    """Returns what a command that is refused says: one line."""
    done = command(*arguments)
    assert done.exit_code == 2 and done.stdout == "", done.output
    (line,) = done.stderr.removeprefix("mpq: ").splitlines()
    return line
