"""Architecture search from end to end: three phases, their folders, interruptions, faults."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_finetune import disturbed, two_processes
from tiny_search import (
    command,
    contents,
    from_checkpoint,
    recipe,
    refusal,
    run,
    search_recipe,
    speech,
    supernet,
    whole,
    write_search,
)
from tiny_training import CrashError, fails_at, log_of, some_always

from mpq.cli.inspection import inspect
from mpq.cli.main import main
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.checkpoint import write_checkpoint
from mpq.pipeline.read import load_recipe
from mpq.search import loop as search_loop
from mpq.search import run as search_module
from mpq.search.loop import ArchitectureSearch
from mpq.search.record import Architecture, SearchResult
from mpq.training import objectives
from mpq.training import weights as weight_loop
from mpq.training.loop import TrainingLoop
from mpq.training.losses import JointLoss
from mpq.training.weights import WeightTrainer

__all__ = ["recipe", "speech", "supernet", "whole"]  # fixtures


def test_a_search_leaves_a_checkpoint_folder(whole: Path, recipe: Recipe) -> None:
    top = {"model.safetensors", "recipe.json", "log.jsonl", "training.json", "search.json", "recipe.toml"}
    assert {path.name for path in whole.iterdir()} == top | {"architecture.svg", "supernet", "architecture"}
    assert {path.name for path in (whole / "supernet").iterdir()} == top - {"search.json", "recipe.toml"}
    assert {path.name for path in (whole / "architecture").iterdir()} == {
        "architecture.json", "log.jsonl", "recipe.json",
    }  # fmt: skip
    model, largest = load_model(whole), load_model(whole / "supernet")
    raw = json.loads((whole / "search.json").read_text())
    assert (raw["format"], raw["space"], raw["method"], raw["checkpoint"]) == ("mpq.search/1", "widths", "gumbel", None)
    assert (raw["eta"], raw["target_millions"], raw["supernet"]) == (50.0, None, str(whole / "supernet"))
    found = Architecture.load(whole / "architecture/architecture.json")
    assert Architecture.of(raw["architecture"]) == found
    assert model.encoder.options.ffn_shapes() == found.shapes()
    assert found.millions * 1e6 == pytest.approx(model.parameter_counts()["total"])
    assert found.largest_millions * 1e6 == pytest.approx(largest.parameter_counts()["total"])
    assert largest.encoder.options.ffn_shapes() == [((32, 0), (32, 0))]
    assert raw["training"]["parameters"] == model.parameter_counts()
    names = [one.name for one in found.modules]
    assert names == ["encoder.layers.0.feed_forward1", "encoder.layers.0.feed_forward2"]
    expected = found.millions * 0
    for one in found.modules:
        assert (one.widths, one.ranks, one.rank_probabilities) == ((4, 12, 32), (0,), (1.0,))
        assert one.width == one.widths[one.width_probabilities.index(max(one.width_probabilities))]
        assert sum(one.width_probabilities) == pytest.approx(1)
        expected += sum(
            share * (33 * width + 16) for share, width in zip(one.width_probabilities, one.widths, strict=True)
        )
    rest = largest.parameter_counts()["total"] - 2 * (33 * 32 + 16)
    assert found.expected_millions * 1e6 == pytest.approx(rest + expected, rel=1e-5)
    assert [one.epoch for one in found.epochs] == [1, 2, 3] and found.epochs[0].dev_loss is None


def test_the_folder_is_taken_by_the_commands_that_follow(whole: Path, speech: Path, tmp_path: Path) -> None:
    model = load_model(whole)
    assert inspect(whole).parameters == model.parameter_counts()
    runner = CliRunner()
    for arguments in (
        ["sensitivity", str(whole), "--data", str(speech / "train.jsonl"), "--bits", "4,8", "--out", "S"],
        ["allocate", "S", "--average-bits", "6", "--out", "A"],
        ["pack", str(whole), "--allocation", "A", "--out", "P"],
        ["evaluate", "P", "--data", str(speech / "dev.jsonl"), "--out", "E"],
    ):
        names = {"S": "s.json", "A": "a.json", "P": "p.safetensors", "E": "e"}
        done = runner.invoke(main, [str(tmp_path / names[one]) if one in names else one for one in arguments])
        assert done.exit_code == 0, done.output
    assert inspect(tmp_path / "p.safetensors").parameters == model.parameter_counts()


@pytest.mark.parametrize("space", ["widths", "ranks", "both"])
def test_the_recipe_that_it_writes_describes_the_model(space: str, speech: Path, tmp_path: Path) -> None:
    ranks = {"search__ffn_rank": [2, 6, 9]} if space != "widths" else {}
    widths = {"search__ffn_width": None} if space == "ranks" else {}
    result = run(search_recipe(speech, search__space=space, **ranks, **widths), tmp_path)
    model = load_model(tmp_path)
    assert model.encoder.options.ffn_shapes() == result.architecture.shapes()
    assert (result.space, result.training.parameters) == (space, model.parameter_counts())
    text = (tmp_path / "recipe.toml").read_text()
    options = ["allocate.average_bits=4", "data.test={one='dev.jsonl'}"]
    found = load_recipe(tmp_path / "recipe.toml", options)
    assert found.checkpoint == str(tmp_path / "model.safetensors") and "train" not in found.stages
    assert found.train.batch_frames == 400 and found.data.root == str(speech)
    with pytest.raises(MpqError, match="describes no model but names one"):
        inspect(tmp_path / "recipe.toml")
    anew = tmp_path / "anew.toml"
    anew.write_text("\n".join(line for line in text.splitlines() if not line.startswith("checkpoint")))
    assert inspect(anew).parameters == model.parameter_counts()
    assert load_recipe(anew, stages=["train"]).model.dropout == 0.1


def test_a_finished_search_is_not_done_again(whole: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in before if path.name in ("model.safetensors", "training.json")}
    fails_at(JointLoss, "forward", 1, monkeypatch)
    result = run(recipe, whole)
    assert result == SearchResult(**{key: getattr(result, key) for key in result.__dataclass_fields__})
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert times == {path: path.stat().st_mtime_ns for path in times}


POINTS = {
    "1: inside an update": (JointLoss, "forward", 3, True),
    "1: before a candidate": (weight_loop, "write_checkpoint", 1, False),
    "1: between a candidate and the state": (weight_loop, "write_checkpoint", 2, True),
    "1: while dev is scored": (objectives, "held_out_errors", 2, False),
    "1: between the model and the result": (weight_loop, "write_checkpoint", 3, True),
    "1: after the result": (weight_loop, "clean_up", 1, False),
    "2: before it claims its folder": (search_loop, "claim_folder", 1, False),
    "2: inside an update": (ArchitectureSearch, "losses", 2, True),
    "2: between the log and a candidate": (ArchitectureSearch, "write_candidate", 2, False),
    "2: between a candidate and the state": (ArchitectureSearch, "write_candidate", 2, True),
    "2: while the architecture is scored": (objectives, "held_out_errors", 2, False),
    "2: before the architecture": (search_loop, "write_json", 2, False),
    "2: after the architecture": (search_loop, "clean_up", 1, False),
    "3: before it claims its folder": (weight_loop, "claim_folder", 1, False),
    "3: between a candidate and the state": (weight_loop, "write_checkpoint", 1, True),
    "3: before the model": (weight_loop, "write_checkpoint", 3, False),
    "3: between the model and the result": (weight_loop, "write_checkpoint", 3, True),
    "3: after the result": (weight_loop, "clean_up", 1, False),
    "before the recipe": (search_module, "write_text", 1, False),
    "before the result": (search_module, "write_json", 1, False),
}


@pytest.mark.parametrize(
    "point", some_always(POINTS, ("1: inside an update", "2: between a candidate and the state", "before the result"))
)
def test_a_killed_search_ends_as_if_it_had_not_been(
    point: str, speech: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a saved state after each update; where it is killed after the first phase, the supernet is there already."""
    often = search_recipe(speech, train__save_minutes=1e-9)
    if not point.startswith("1: "):
        shutil.copytree(whole / "supernet", tmp_path / "supernet")
    with monkeypatch.context() as patch:
        fails_at(*POINTS[point][:3], patch, POINTS[point][3])
        with pytest.raises(CrashError):
            run(often, tmp_path)
    run(often, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_many_kills_and_the_folders_are_the_same(
    speech: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every third saved state."""
    often, kills = search_recipe(speech, train__save_minutes=1e-9), 0
    while True:
        with monkeypatch.context() as patch:
            fails_at(TrainingLoop, "_save", 3, patch, after=True)
            try:
                run(often, tmp_path)
                break
            except CrashError:
                kills += 1
    assert kills >= 7 and contents(tmp_path) == contents(whole)


def test_a_stopped_search_goes_on(
    speech: Path, recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in each phase, as the command line sees it; the update under way is finished, and none done twice."""
    done: list[tuple[str, int]] = []
    path = write_search(speech / "stopped.toml")
    for owner in (WeightTrainer, ArchitectureSearch):
        prepare = owner.prepare_update

        def asked(loop: Any, prepare: Any = prepare) -> None:
            done.append((loop.out.name, loop.step))
            if loop.step == 1:
                signal.raise_signal(signal.SIGTERM)
            prepare(loop)

        monkeypatch.setattr(owner, "prepare_update", asked)
    statuses = [command(path, "--out", tmp_path).exit_code for _ in range(4)]
    assert statuses == [130, 130, 130, 0]
    assert len(set(done)) == len(done) and {name for name, _ in done} == {"supernet", "architecture", tmp_path.name}
    assert contents(tmp_path) == contents(whole)


def test_searches_share_a_supernet(whole: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = whole / "supernet"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in supernet.iterdir()}
    path = write_search(speech / "shared.toml")
    done = command(path, "--supernet", supernet, "--eta", "0", "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert (raw["format"], raw["eta"], raw["supernet"]) == ("mpq.search/1", 0.0, str(supernet))
    assert not (tmp_path / "a/supernet").exists()
    monkeypatch.chdir(supernet.parent)  # from here on
    done = command(path, "--supernet", "supernet", "--target-millions", "0.008", "--out", tmp_path / "b", "--json")
    raw = json.loads(done.stdout)
    assert (raw["eta"], raw["target_millions"], raw["supernet"]) == (None, 0.008, str(supernet))
    assert raw["architecture"]["millions"] <= 0.008
    held_out = ["--held-out", speech / "other.jsonl", "--method", "softmax", "--final-epochs", "1"]
    done = command(path, "--supernet", supernet, *held_out, "--out", tmp_path / "c", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["method"] == "softmax", done.output
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in supernet.iterdir()}
    for options in (
        ["--seed", 1],
        ["--ffn-width", "[4, 12]"],
        ["--ffn2-width", "[4, 32]"],
        ["--supernet-epochs", 3],
        ["--set", "train.learning_rate=0.002"],
        ["--set", "model.dropout=0.2"],
        ["--set", "augment.speed=[1.0]"],
        ["--set", "data.dev=other.jsonl"],
        ["--set", "data.train=['other.jsonl']"],
    ):
        line = refusal(path, "--supernet", supernet, *options, "--out", tmp_path / "d")
        assert line.startswith(f"{supernet}: holds a finished training with other options or data"), line
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in supernet.iterdir()}


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ({"search__eta": 49.0}, "architecture"),
        ({"search__eta": None, "search__target_millions": 0.008}, "architecture"),
        ({"search__method": "softmax"}, "architecture"),
        ({"search__temperature": [2.0, 0.1]}, "architecture"),
        ({"search__epochs": 2}, "architecture"),
        ({"search__learning_rate": 0.1}, "architecture"),
        ({"search__held_out": "other.jsonl"}, "architecture"),
        ({"search__final_epochs": 1}, ""),
        ({"search__final_learning_rate": 0.1}, ""),
        ({"seed": 1}, "supernet"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(
    options: dict[str, Any], folder: str, speech: Path, whole: Path
) -> None:
    before = contents(whole)
    with pytest.raises(MpqError) as caught:
        run(search_recipe(speech, **options), whole)
    where = whole / folder if folder else whole
    assert str(caught.value).startswith(f"{where}: holds a finished training with other options or data")
    assert contents(whole) == before


def test_the_choice_of_another_supernet_is_not_taken(speech: Path, whole: Path, tmp_path: Path) -> None:
    other = search_recipe(speech, search__supernet=str(tmp_path / "other"), train__weight_decay=0.02)
    with pytest.raises(MpqError, match="architecture: holds a finished training with other options or data"):
        run(other, whole)
    assert not (tmp_path / "other").exists()


def test_options_that_change_nothing_are_not_refused(speech: Path, whole: Path) -> None:
    before = contents(whole)
    run(search_recipe(speech, train__save_minutes=3.0, train__workers=1), whole)
    assert {key: one for key, one in contents(whole).items() if key != "recipe.toml"} == {
        key: one for key, one in before.items() if key != "recipe.toml"
    }


def test_without_development_data(speech: Path, tmp_path: Path) -> None:
    options = {"data__dev": None, "search__held_out": "dev.jsonl", "train__select": "last"}
    result = run(search_recipe(speech, **options), tmp_path)
    assert result.training.dev_loss is None and result.architecture.loss > 0


def test_a_model_of_ctc_alone(speech: Path, tmp_path: Path) -> None:
    (tmp_path / "ctc").mkdir()
    without = {"model__decoder_layers": 0, "train__ctc_weight": 1.0}
    result = run(search_recipe(speech, **without), tmp_path / "scratch")
    lines = [line for line in log_of(tmp_path / "scratch/architecture") if "rate" in line]
    assert "attention" not in lines[0] and result.architecture.loss > 0
    model = load_model(tmp_path / "scratch")
    disturbed(model)
    write_checkpoint(tmp_path / "ctc/model.safetensors", model)
    for loss in ("transcripts", "distillation"):
        options = without | {"search__loss": loss, "search__ffn_width": [2, 4]}
        run(from_checkpoint(speech, tmp_path / "ctc", **options), tmp_path / loss)
    shared = without | {"search__loss": "transcripts", "search__ffn_width": [2, 4]}
    one = run(from_checkpoint(speech, tmp_path / "ctc", **shared | {"train__ctc_weight": 0.2}), tmp_path / "d")
    assert one.training.fingerprint == json.loads((tmp_path / "transcripts/training.json").read_text())["fingerprint"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(speech: Path, tmp_path: Path) -> None:
    options = {"model__dropout": 0.0, "search__epochs": 4, "train__batch_frames": 700, "train__accumulate": 2}
    path = write_search(speech / "two.toml", **options)
    assert two_processes(["search", path, "--out", tmp_path / "two", "--quiet"]) == [0, 0]
    run(load_recipe(path, stages=["search"]), tmp_path / "one")
    shared = ["--supernet", tmp_path / "one/supernet", "--final-epochs", 0]
    assert two_processes(["search", path, "--out", tmp_path / "logits", "--quiet", *shared]) == [0, 0]
    one, two, logits = (
        Architecture.load(tmp_path / name / "architecture/architecture.json") for name in ("one", "two", "logits")
    )
    for other, tolerance in ((two, 1e-3), (logits, 1e-6)):
        assert other.shapes() == one.shapes()
        assert other.loss == pytest.approx(one.loss, rel=max(1e-5, tolerance))
        for module, same in zip(other.modules, one.modules, strict=True):
            assert module.width_probabilities == pytest.approx(same.width_probabilities, abs=tolerance)
    assert json.loads((tmp_path / "two/search.json").read_text())["training"]["processes"] == 2
