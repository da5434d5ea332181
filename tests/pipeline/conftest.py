"""Runs of tiny recipes that several test modules look at, each done once."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_finetune import OPTIONS
from tiny_runs import STAGES, TARGET_MB, actions
from tiny_search_runs import TRAINED, WIDTHS
from tiny_search_runs import actions as search_actions
from tiny_training import TEXTS, write_recipe, write_speech

from mpq.config import STAGES as ALL_STAGES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a hybrid model of one block, its data beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_speech(folder)
    for name, texts in (("dev.jsonl", TEXTS[:3]), ("one.jsonl", TEXTS[3:7]), ("two.jsonl", TEXTS[7:])):
        write_speech(folder, texts, name)
    changes = {"data.test__one": "one.jsonl", "data.test__two": "two.jsonl"}
    return write_recipe(
        folder / "recipe.toml", train__epochs=2, sensitivity__bits=[2, 4, 8], allocate__target_mb=TARGET_MB,
        decode__method="prefix", decode__beam_size=2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="session")
def whole(tiny: Path) -> Path:
    """The folder of an uninterrupted run."""
    out = tiny.parent / "whole"
    assert actions(tiny, out) == dict.fromkeys(STAGES, "run")
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="session")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a hybrid model of two blocks, its data beside it."""
    folder = tmp_path_factory.mktemp("searching")
    write_speech(folder)
    for name, texts in (("dev.jsonl", TEXTS[:3]), ("held.jsonl", TEXTS[4:8]), ("one.jsonl", TEXTS[3:7])):
        write_speech(folder, texts, name)
    search = {
        "ffn_width": WIDTHS, "eta": 30.0, "epochs": 3, "learning_rate": 0.5, "held_out": "held.jsonl",
        "supernet_epochs": 2, "final_epochs": 2,
    }  # fmt: skip
    changes = {f"search__{key}": value for key, value in search.items()}
    changes |= {"data.test__one": "one.jsonl"} | {f"finetune__{key}": value for key, value in OPTIONS.items()}
    path = write_recipe(
        folder / "recipe.toml", model__layers=2, train__epochs=2,
        sensitivity__bits=[2, 4, 8], allocate__average_bits=4.0, **changes,
    )  # fmt: skip
    path.write_text(f"stages = {json.dumps(ALL_STAGES)}\n{path.read_text()}")
    return path


@pytest.fixture(scope="session")
def searched(searching: Path) -> Path:
    """The folder of an uninterrupted run, the search from scratch."""
    out = searching.parent / "whole"
    assert search_actions(searching, out) == dict.fromkeys(ALL_STAGES, "run")
    return out


@pytest.fixture(scope="session")
def from_trained(searching: Path) -> Path:
    out = searching.parent / "trained"
    assert search_actions(searching, out, *TRAINED) == dict.fromkeys(ALL_STAGES, "run")
    return out
