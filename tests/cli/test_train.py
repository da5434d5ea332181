"""The commands that follow a recipe: `mpq search`, its faults, and what it is given."""

import json
from pathlib import Path

from click.testing import CliRunner
from tiny_search import command, contents, recipe, refusal, speech, supernet, whole, write_search

from mpq.cli.main import main
from mpq.loading import load_model
from mpq.pipeline.read import load_recipe

__all__ = ["recipe", "speech", "supernet", "whole"]  # fixtures


def test_a_nemo_model_from_the_command_line(tiny_archive: Path, many_tones: Path, tmp_path: Path) -> None:
    """No recipe; it imitates the archive, whose audio needs no transcripts."""
    sets = ["--set", "train.epochs=2", "--set", "train.workers=0"]
    arguments = [tiny_archive, "--train", many_tones, "--dev", many_tones, "--epochs", 2, *sets]
    done = command(*arguments, "--target-millions", "0.0135", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert raw["checkpoint"]["path"] == str(tiny_archive) and raw["architecture"]["wer"] is None
    assert raw["architecture"]["modules"][0]["widths"] == list(range(8, 33))
    model = load_model(tmp_path)
    assert model.family == "nemo" and model.parameter_counts()["total"] <= 13500
    assert load_recipe(tmp_path / "recipe.toml", ["allocate.average_bits=4"], stages=["sensitivity", "allocate"])
    before = contents(tmp_path)
    assert command(*arguments, "--target-millions", "0.0135", "--out", tmp_path).exit_code == 0
    assert contents(tmp_path) == before


def test_faults_of_the_command_line(speech: Path, tmp_path: Path) -> None:
    path, out = write_search(speech / "faulty.toml", search__eta=None), tmp_path / "out"
    checkpoint, train, dev = speech / "hybrid", speech / "train.jsonl", speech / "dev.jsonl"
    where = "[search] eta: expected one of eta and target_millions, got"
    assert refusal(path, "--out", out) == f"{path}: {where} none"
    both = ["--eta", 1, "--target-millions", 1]
    assert refusal(path, *both, "--out", out) == f"{path}: {where} eta and target_millions"
    assert refusal(path, "--eta", -1, "--out", out) == f"{path}: [search] eta: expected 0 or more, got -1"
    line = f"--train, --dev, --channel, --skip-bad: {path} is a recipe, whose [data] say that; leave them out"
    assert refusal(path, "--eta", 1, "--train", train, "--out", out) == line
    assert refusal(path, "--eta", 1, "--channel", "mix", "--out", out) == line
    assert refusal(path, "--eta", 1, "--skip-bad", "--out", out) == line
    assert refusal(path, "--eta", 1, "--dev", dev, "--out", out) == line
    line = f"--train, --dev: expected both for a checkpoint ({checkpoint}), or a recipe (.toml) instead"
    assert refusal(checkpoint, "--eta", 1, "--train", train, "--out", out) == line
    assert refusal(checkpoint, "--eta", 1, "--dev", dev, "--out", out) == line
    data = [checkpoint, "--train", train, "--dev", dev, "--out", out]
    assert refusal(*data) == f"mpq search: {where} none"
    assert "--set model.width=3: mpq search does not read model" in refusal(*data, "--eta", 1, "--set", "model.width=3")
    assert "[search] ffn_rank: expected rising candidates" in refusal(*data, "--eta", 1, "--ffn-rank", "[3, 2]")
    assert "[search] temperature: expected first and last, falling, got [0.1, 1.0]" in refusal(
        path, "--eta", 1, "--temperature", "[0.1, 1.0]", "--out", out
    )
    assert '[search] loss: "distillation" needs a trained model to imitate' in refusal(
        path, "--eta", 1, "--loss", "distillation", "--out", out
    )
    assert "[search] ffn_width: expected one list for each of the 1 blocks, got 2" in refusal(
        path, "--eta", 1, "--ffn-width", "[[4],[4]]", "--out", out
    )
    assert "[search] held_out: " in refusal(path, "--eta", 1, "--held-out", "none.jsonl", "--out", out)
    bare = write_search(speech / "bare.toml", data__dev=None, train__select="last")
    line = "[search] held_out: expected data to choose on (or data.dev), got none"
    assert refusal(bare, "--out", out) == f"{bare}: {line}"
    undecided = write_search(speech / "undecided.toml", data__dev=None, search__held_out="dev.jsonl")
    assert 'train.select = "wer" needs held-out data' in refusal(undecided, "--out", out)
    empty = write_search(speech / "empty.toml", data__train=[])
    assert "[data] train: expected one manifest or more, got none" in refusal(empty, "--out", out)
    assert not out.exists()


def test_a_budget_on_the_command_line_replaces_the_recipes(speech: Path, supernet: str, tmp_path: Path) -> None:
    path = write_search(speech / "target.toml", search__eta=None, search__target_millions=0.0001)
    done = command(path, "--eta", 3, "--supernet", supernet, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert (raw["format"], raw["eta"], raw["target_millions"]) == ("mpq.search/1", 3.0, None)
    shown = command(path, "--eta", 3, "--supernet", supernet, "--out", tmp_path / "out")
    assert "eta 3" in shown.stdout and "FW-m" in shown.stdout and "BN" not in shown.stdout


def test_a_packed_file_is_no_start(speech: Path, tmp_path: Path) -> None:
    packed = tmp_path / "p.safetensors"
    done = CliRunner().invoke(main, ["pack", str(speech / "hybrid"), "--bits", "8", "--out", str(packed)])
    assert done.exit_code == 0, done.output
    line = refusal(
        packed, "--train", speech / "train.jsonl", "--dev", speech / "dev.jsonl", "--eta", 1, "--out", tmp_path / "o"
    )
    assert line == f"{packed}: already packed; search the float checkpoint that it was made from"
