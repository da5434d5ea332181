"""The scripts of recipes/read_speech that make the table of fine-tuning, on a tiny model and a few tones."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
from click.testing import CliRunner
from tiny_scripts import script

from mpq.allocation.records import Allocation
from mpq.errors import MpqError
from mpq.pipeline.read import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes/read_speech"


def test_a_fine_tuned_row(
    tiny_archive: Path, tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_manifest.parent, tmp_path / "data")
    for name in ("train", "dev", "test", "test_clean"):
        shutil.copy(tmp_path / "data/data.jsonl", tmp_path / f"data/{name}.jsonl")
    module = script("read_speech", "finetune", monkeypatch)
    monkeypatch.setattr(module, "ROWS", (module.ROWS[0], module.Row("tuned", 3, epochs=1)))
    arguments = [str(one) for one in (tiny_archive, tmp_path / "data", tmp_path / "data", tmp_path / "run")]
    done = CliRunner().invoke(module.main, arguments, catch_exceptions=False)
    head, _, full, tuned = done.stdout.splitlines()
    allocation = Allocation.load(tmp_path / "run/asymmetric-gptq-mixed-3.json")
    assert allocation.average_bits <= 3
    cells = [cell.strip() for cell in tuned.strip("|").split("|")]
    assert len(cells) == head.strip("|").count("|") + 1 and cells[:2] == ["tuned", str(allocation.predicted_bytes)]
    name, size, ratio = (cell.strip() for cell in full.split("|")[1:4])
    assert (name, ratio) == ("float32", "1") and float(cells[2]) == round(int(size) / int(cells[1]), 2)
    again = CliRunner().invoke(module.main, arguments, catch_exceptions=False)  # nothing is done twice
    assert again.stdout == done.stdout


def test_synthetic_voices(tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["synthetic.py", str(tiny_manifest), str(tmp_path / "out"), "--count", "3"])
    module = script("read_speech", "synthetic", monkeypatch)
    module.main()
    lines = [json.loads(line) for line in (tmp_path / "out/synthetic.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(set(line) == {"audio_filepath", "duration"} for line in lines)
    for line in lines:
        samples, rate = soundfile.read(tmp_path / "out" / line["audio_filepath"])
        assert rate == 16000 and abs(len(samples) / rate - line["duration"]) < 1e-3 and samples.std() > 0.01


def test_the_recipe_names_its_stages() -> None:
    recipe = load_recipe(FOLDER / "finetune.toml", need_files=False)
    assert recipe.stages == ["evaluate", "sensitivity", "allocate", "pack", "finetune", "compare"]


def test_the_picture_shows_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and word errors are those of the page, and each line of the legend has its rows."""
    module = script("read_speech", "figure", monkeypatch)
    found = {point.name: point for point in module.points(module.PAGE.read_text())}
    assert next(iter(found)) == "float32" and (found["float32"].wer, found["float32"].is_worse) == (4.12, False)
    tuned = found["mixed 3, fine-tuned slowly"]
    assert (round(tuned.megabytes * 2**20), tuned.wer, tuned.is_worse) == (5706156, 4.29, False)
    assert (found["mixed 2"].wer, found["mixed 2"].is_worse) == (42.24, True)
    for pattern in module.SERIES.values():
        assert sum(bool(re.fullmatch(pattern, name)) for name in found) >= 2
    done = CliRunner().invoke(module.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    for background, colours in module.COLOURS.items():
        picture = (tmp_path / f"wer_by_size_{background}.svg").read_text()
        assert all(colour in picture for colour in colours)
    with pytest.raises(MpqError, match=r"finetune\.py prints it"):
        list(module.points("| another | table |"))
