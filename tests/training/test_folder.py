"""A checkpoint folder is never taken for another's, never lost to a kill, and not overwritten."""

import json
from pathlib import Path

import pytest
from tiny_training import (
    TEXTS,
    CrashError,
    assert_same,
    dropping,
    fails_at,
    recipe,
    speech,
    whole,
    with_options,
    write_speech,
)

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.training import objectives
from mpq.training.losses import JointLoss
from mpq.training.record import TrainingResult
from mpq.training.run import train

__all__ = ["dropping", "speech", "whole"]  # fixtures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder, TEXTS[:4])
    write_speech(folder, TEXTS[4:6], "dev.jsonl")
    return recipe(folder, train__average=1, train__epochs=3)


@pytest.mark.parametrize("name", ["model.safetensors", "log.jsonl", "state.pt", "recipe.json", "epochs"])
def test_files_of_somebody_else_are_left_alone(tiny: Recipe, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(MpqError, match=f"{name}: is in the way, and no training wrote it; choose another --out"):
        train(tiny, tmp_path, quiet=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"somebody's"}


def test_a_model_that_was_deleted_is_trained_again(tiny: Recipe, tmp_path: Path) -> None:
    train(tiny, tmp_path / "out", quiet=True)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "out/model.safetensors").unlink()
    train(tiny, tmp_path / "out", quiet=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_an_option_that_is_new_and_not_used_goes_on(tiny: Recipe, tmp_path: Path) -> None:
    """A finished training from before `augment.level_db`, then with other values of what its record says."""
    out, record = tmp_path / "out", tmp_path / "out/training.json"
    result = train(tiny, out, quiet=True)
    assert result.inputs["augment"].pop("level_db") == [0.0, 0.0]
    record.write_text(json.dumps(result.to_json() | {"fingerprint": "of an older version"}))
    assert train(tiny, out, quiet=True).fingerprint == "of an older version"
    louder = tiny.model_copy(update={"augment": tiny.augment.model_copy(update={"level_db": (-1.0, 0.0)})})
    words = r"holds a finished training with other options or data .*: augment.level_db: none there, \[-1.0, 0.0\] now"
    with pytest.raises(MpqError, match=words):
        train(louder, out, quiet=True)
    result.inputs["train"]["epochs"] = 50  # as if it had been the default then
    record.write_text(json.dumps(result.to_json()))
    with pytest.raises(MpqError, match=r"train\.epochs: 50 there, 3 now; choose another --out, or delete the folder"):
        train(tiny, out, quiet=True)
    record.write_text(json.dumps({"format": "mpq.training/1", "fingerprint": result.fingerprint}))
    with pytest.raises(MpqError, match="an older version of mpq wrote it, which did not put its inputs on record"):
        train(tiny, out, quiet=True)


def test_what_somebody_put_beside_a_finished_training_stays(tiny: Recipe, tmp_path: Path) -> None:
    """What a kill at the very end left is removed by the next run; a folder `epochs` with other files is not."""
    train(tiny, tmp_path, quiet=True)
    (tmp_path / "epochs").mkdir()
    for name in ("0002.safetensors", "0003.safetensors.partial"):
        (tmp_path / "epochs" / name).touch()
    train(tiny, tmp_path, quiet=True)
    assert not (tmp_path / "epochs").exists()
    (tmp_path / "epochs").mkdir()
    (tmp_path / "epochs/best.safetensors").touch()
    train(tiny, tmp_path, quiet=True)
    assert [path.name for path in (tmp_path / "epochs").iterdir()] == ["best.safetensors"]


def test_a_finished_training_is_not_done_again(whole: Path, dropping: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    fails_at(JointLoss, "forward", 1, monkeypatch)
    assert train(dropping, whole, quiet=True) == TrainingResult.load(whole / "training.json")
    assert before == {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_training_in_the_same_folder_is_refused(
    is_finished: bool, speech: Path, dropping: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole
    if not is_finished:
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            fails_at(objectives, "held_out_errors", 2, patch)
            with pytest.raises(CrashError):
                train(dropping, out, quiet=True)
    word = "a finished" if is_finished else "an unfinished"
    write_speech(tmp_path, [*TEXTS[:-1], "abba"])  # another transcript
    write_speech(tmp_path, ["abed", "dace", "a bee"], "dev.jsonl")
    write_speech(tmp_path / "longer", seconds=0.17)
    write_speech(tmp_path / "longer", ["abed", "dace", "a bee"], "dev.jsonl")
    write_speech(speech, ["abed", "dace", "a bed"], "other.jsonl")
    others = [
        with_options(dropping, learning_rate=0.004),
        with_options(dropping, epochs=4),
        dropping.model_copy(update={"seed": 1}),
        dropping.model_copy(update={"model": dropping.model.model_copy(update={"dropout": 0.2})}),
        dropping.model_copy(update={"augment": dropping.augment.model_copy(update={"speed": [1.0]})}),
        recipe(tmp_path, model__dropout=0.1),
        recipe(tmp_path / "longer", model__dropout=0.1),
        recipe(speech, model__dropout=0.1, data__dev="other.jsonl"),
    ]
    for other in others:
        with pytest.raises(MpqError, match=f"holds {word} training with other options or data"):
            train(other, out, quiet=True)
    neutral = with_options(dropping, workers=1, save_minutes=3.0, tensorboard=False)
    if is_finished:
        assert train(neutral, out, quiet=True).fingerprint == TrainingResult.load(out / "training.json").fingerprint
    else:
        train(neutral, out, quiet=True)
        assert_same(out, whole)


def test_a_folder_that_cannot_be_made(speech: Path, dropping: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MpqError, match="the folder cannot be made"):
        train(dropping, tmp_path / "file" / "out", quiet=True)
