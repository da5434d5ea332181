"""Which model each stage works on, and what the stages share of paths, data and options."""

from pathlib import Path
from typing import Any

import pytest
from tiny_training import TEXTS, write_speech

from mpq.allocation.records import Allocation
from mpq.config import Recipe
from mpq.pipeline.setting import Setting, recipe_quantizer
from mpq.speech.decoding import DecodeOptions

OUT = Path("out")


def setting(**table: Any) -> Setting:
    return Setting(Recipe.model_validate(table), OUT, "cpu", quiet=True)


@pytest.mark.parametrize(
    ("table", "baseline", "start", "quantized", "reference"),
    [
        ({"stages": ["train"]}, OUT / "train", None, OUT / "train", OUT / "train"),
        ({"stages": ["pack"], "checkpoint": "m.nemo"}, Path("m.nemo"), Path("m.nemo"), Path("m.nemo"), Path("m.nemo")),
        ({"stages": ["search"]}, None, None, OUT / "search", OUT / "search"),
        ({"stages": ["train", "search"]}, OUT / "train", None, OUT / "search", OUT / "train"),
        (
            {"stages": ["train", "search"], "search": {"trained": True}},
            OUT / "train",
            OUT / "train/model.safetensors",
            OUT / "search",
            OUT / "train",
        ),
        ({"stages": ["search"], "checkpoint": "m"}, Path("m"), Path("m"), OUT / "search", Path("m")),
    ],
)
def test_who_is_quantized_and_who_is_compared_with(
    table: dict[str, Any], baseline: Path | None, start: Path | None, quantized: Path, reference: Path
) -> None:
    found = setting(**table)
    assert (found.baseline, found.start, found.checkpoint, found.reference) == (baseline, start, quantized, reference)
    assert found.maker == ("search" if "search" in table["stages"] else "train")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train": ["a", "b"]}, "a"),
        ({"train": ["a"], "calibration": "c"}, "c"),
        ({"train": ["a"], "root": "/d"}, "/d/a"),
    ],
)
def test_calibration_audio_is_that_of_the_training_unless_it_is_named(data: dict[str, Any], expected: str) -> None:
    assert setting(data=data).calibration == Path(expected)


def test_the_same_data_elsewhere_are_the_same(tmp_path: Path) -> None:
    names = {"train": ["train.jsonl"], "dev": "dev.jsonl", "test": {"one": "dev.jsonl"}}
    for folder in ("here", "there", "other"):
        write_speech(tmp_path / folder)
        write_speech(tmp_path / folder, TEXTS[:2] if folder == "other" else TEXTS[:3], "dev.jsonl")
    here, there, other = (setting(data=names | {"root": str(tmp_path / one)}) for one in ("here", "there", "other"))
    assert here.training_inputs() == there.training_inputs() and here.test_inputs() == there.test_inputs()
    assert here.calibration_identity() == other.calibration_identity() == here.identity("train.jsonl")
    assert here.training_data()["train"] == other.training_data()["train"]
    assert here.training_data()["dev"] != other.training_data()["dev"]
    assert here.test_inputs() != other.test_inputs()


@pytest.mark.parametrize("key", ["channel", "skip_bad", "max_seconds"])
def test_how_audio_is_read_is_an_input_of_the_training(key: str, tmp_path: Path) -> None:
    data = {"train": [str(write_speech(tmp_path))]}
    changed = data | {key: {"channel": "mix", "skip_bad": True, "max_seconds": 3.0}[key]}
    assert setting(data=data).training_inputs() != setting(data=changed).training_inputs()


def test_the_options_of_the_search_for_transcripts() -> None:
    found = setting(decode={"method": "joint", "beam_size": 3, "ctc_weight": 0.25, "length_bonus": 0.5}).decode
    assert found == DecodeOptions(method="joint", beam_size=3, ctc_weight=0.25, length_bonus=0.5)


def test_the_quantizer_has_the_options_that_the_recipe_names() -> None:
    options = {"scheme": "mulaw", "granularity": "channel", "clip": "none", "rounding": "nearest"}
    raw = recipe_quantizer(Recipe.model_validate({"sensitivity": options})).to_json()
    assert {key: raw[key] for key in options} == options
    assert recipe_quantizer(Recipe()).to_json()["rounding"] == "gptq"


@pytest.mark.parametrize(
    ("rounding", "is_there", "moved"), [("gptq", False, True), ("gptq", True, False), ("nearest", False, False)]
)
def test_calibration_audio_that_was_moved_is_looked_for_where_it_is_needed(
    rounding: str, is_there: bool, moved: bool, tmp_path: Path
) -> None:
    was = tmp_path / "was.jsonl"
    if is_there:
        was.touch()
    data = {"path": str(was), "sha256": "s"}
    allocation = Allocation({}, 0, 0, 0.0, 4.0, (), quantizer={"rounding": rounding}, data=data)
    found = setting(data={"train": ["a"]}).moved_calibration(allocation)
    assert found == (Path("a") if moved else None)
