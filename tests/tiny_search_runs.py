"""`mpq run` with a search, what it left behind, and interruptions of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mpq.cli.main import main
from mpq.config import STAGES
from mpq.loading import load_model
from mpq.models.conformer import FeedForward
from mpq.training.weights import WeightTrainer

SKIPPED = dict.fromkeys(STAGES, "skipped")
AFTER_SEARCH = ("sensitivity", "allocate", "pack", "finetune", "compare")
WIDTHS = [8, 16, 32]
TRAINED = ("search.trained=true",)


def mpq_run(recipe: Path, out: Path, *options: str) -> Result:
    words = [word for option in options for word in ((option,) if option.startswith("--") else ("--set", option))]
    return CliRunner().invoke(main, ["run", str(recipe), "--out", str(out), "--device", "cpu", *words])


def actions(recipe: Path, out: Path, *options: str) -> dict[str, str]:
    """Returns what a run did with each stage; `options` are those of --set, or begin with --."""
    done = mpq_run(recipe, out, "--json", *options)
    assert done.exit_code == 0, done.output
    return {stage["name"]: stage["action"] for stage in json.loads(done.stdout)["stages"]}


def changed(redone: tuple[str, ...]) -> dict[str, str]:
    return SKIPPED | dict.fromkeys(redone, "run")


def results(out: Path) -> dict[str, Any]:
    return {name: one.get("result") for name, one in json.loads((out / "run.json").read_text())["stages"].items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def row(table: str, name: str) -> list[str]:
    """Returns the cells of a row of the table that `mpq run` prints."""
    (line,) = (line for line in table.splitlines() if line.replace("│", " ").split()[:1] == [name])
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def hidden_widths(model: Path) -> list[list[int]]:
    """Returns what the weights themselves say of each block's two feed-forward modules."""
    modules = [one for one in load_model(model).encoder.modules() if isinstance(one, FeedForward)]
    flat = [next(iter(module.parameters())).shape[0] for module in modules]
    return [flat[index : index + 2] for index in range(0, len(flat), 2)]


@pytest.fixture(scope="session")
def tiny(searching: Path) -> Path:
    """The recipe, which the fixtures of conftest.py work on under this name."""
    return searching


@pytest.fixture(scope="session")
def whole(searched: Path) -> Path:
    """The folder of its run."""
    return searched


def trained_folders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the name of the folder of each training of weights."""
    folders, train = [], WeightTrainer.train

    def noted(self: WeightTrainer) -> Any:
        folders.append(self.out.name)
        return train(self)

    monkeypatch.setattr(WeightTrainer, "train", noted)
    return folders
