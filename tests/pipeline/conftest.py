"""A run of a tiny recipe that several test modules look at."""

import shutil
from pathlib import Path

import pytest
from tiny_runs import STAGES, TARGET_MB, actions
from tiny_training import TEXTS, write_recipe, write_speech


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
