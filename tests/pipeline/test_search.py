"""The stage search of `mpq run`: what follows works on the model found, and is compared with the one before it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_finetune import OPTIONS, one_thread
from tiny_training import TEXTS, write_recipe, write_speech

from mpq.cli.main import main
from mpq.config import STAGES
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.conformer import FeedForward
from mpq.search.loop import ArchitectureSearch
from mpq.training.weights import WeightTrainer

__all__ = ["one_thread"]  # a fixture

SKIPPED = dict.fromkeys(STAGES, "skipped")
AFTER_SEARCH = ("sensitivity", "allocate", "pack", "finetune", "compare")
WIDTHS = [8, 16, 32]
TRAINED = ("search.trained=true",)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a hybrid model of two blocks, its data beside it."""
    folder = tmp_path_factory.mktemp("tiny")
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
    path.write_text(f"stages = {json.dumps(STAGES)}\n{path.read_text()}")
    return path


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Path:
    """The folder of an uninterrupted run, the search from scratch."""
    out = tiny.parent / "whole"
    assert actions(tiny, out) == dict.fromkeys(STAGES, "run")
    return out


@pytest.fixture(scope="module")
def from_trained(tiny: Path) -> Path:
    out = tiny.parent / "trained"
    assert actions(tiny, out, *TRAINED) == dict.fromkeys(STAGES, "run")
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


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


def test_the_model_found_is_what_follows_works_on(whole: Path) -> None:
    found, figures = whole / "search/model.safetensors", results(whole)
    widths = figures["search"]["widths"]
    assert widths == hidden_widths(found) == hidden_widths(whole / "packed.safetensors")
    assert widths == hidden_widths(whole / "finetune") and hidden_widths(whole / "train") == [[32, 32], [32, 32]]
    assert min(min(block) for block in widths) < 32 and {width for block in widths for width in block} <= set(WIDTHS)
    parameters = {name: load_model(whole / name).parameter_counts()["total"] for name in ("search", "train")}
    assert figures["search"]["parameters"] == {"found": parameters["search"], "largest": parameters["train"]}
    assert figures["search"]["dev_wer"] == read(whole / "search/training.json")["dev_wer"]
    assert figures["pack"]["float_bytes"] == 4 * parameters["search"]
    for path in ("sensitivity.json", "allocation.json", "finetune/finetune.json"):
        record = read(whole / path)
        assert record.get("model", record.get("checkpoint"))["path"] == str(found), path
    searched = read(whole / "search/search.json")
    assert searched["checkpoint"] is None and searched["eta"] == 30.0


def test_all_are_compared_with_the_model_before_the_search(whole: Path) -> None:
    assert read(whole / "float/one/metrics.json")["model"]["path"] == str(whole / "train/model.safetensors")
    compared = results(whole)["compare"]
    assert set(compared) == {"tests", "searched", "finetuned"}
    for key, what, prefix in (
        ("tests", "packed", "comparison"),
        ("searched", "searched", "comparison-searched"),
        ("finetuned", "finetuned", "comparison-finetuned"),
    ):
        comparison = read(whole / f"{prefix}-one.json")
        assert (comparison["a"]["name"], comparison["b"]["name"]) == ("float32", what)
        assert comparison["a"]["wer"] == read(whole / "float/one/metrics.json")["wer"]
        assert comparison["b"]["wer"] == read(whole / what / "one/metrics.json")["wer"] == compared[key]["one"]["wer"]
        assert compared[key]["one"]["lossless"] == comparison["lossless"]
    model = read(whole / "searched/one/metrics.json")["model"]["path"]
    assert model == str(whole / "search/model.safetensors")


def test_the_table_has_the_true_sizes_and_their_ratios(tiny: Path, whole: Path) -> None:
    table, baseline = mpq_run(tiny, whole, "--quiet").stdout, os.path.getsize(whole / "train/model.safetensors")
    assert row(table, "float32")[1:3] == [str(baseline), "1"]
    for name, file in (
        ("searched", "search/model.safetensors"),
        ("packed", "packed.safetensors"),
        ("fine-tuned", "finetune/packed.safetensors"),
    ):
        size = os.path.getsize(whole / file)
        assert row(table, name)[1:3] == [str(size), f"{baseline / size:.2f}"]
    found = results(whole)["search"]
    assert found["baseline_bytes"] == baseline
    assert found["ratio"] == baseline / os.path.getsize(whole / "search/model.safetensors") > 1


def test_a_second_run_does_nothing(tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(finished)
    for name in ("train", "search", "finetune", "evaluate"):
        monkeypatch.setattr(f"mpq.pipeline.stages.{name}", None)
    assert actions(tiny, finished) == SKIPPED and actions(tiny, finished, "--dry-run") == SKIPPED
    assert actions(tiny, finished, "train.save_minutes=3.0", "search.supernet=elsewhere") == SKIPPED
    assert contents(finished) == before
    monkeypatch.setattr("mpq.pipeline.stages.__version__", "99.0")  # an upgrade neither trains nor searches anew
    done = actions(tiny, finished, "--dry-run")
    assert {name for name, action in done.items() if action == "skipped"} == {"train", "search"}


def test_data_that_are_copied_or_moved_are_the_same_data(
    tiny: Path, whole: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other paths, times and inodes, the same contents: nothing is done again, not even a supernet."""
    for name in ("train", "search", "finetune", "evaluate", "measure_sensitivity", "pack", "compare"):
        monkeypatch.setattr(f"mpq.pipeline.stages.{name}", None)
    before, inodes = contents(finished), {path: path.stat().st_ino for path in finished.iterdir()}
    (tmp_path / "data").mkdir()
    for path in tiny.parent.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / "data" / path.name)
    assert actions(tiny, finished, f"data.root={tmp_path}/data") == SKIPPED
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    recipe = tmp_path / "elsewhere/recipe.toml"
    assert actions(recipe, finished) == SKIPPED
    assert contents(finished) == before and {path: path.stat().st_ino for path in finished.iterdir()} == inodes
    (tmp_path / "elsewhere/train-0.wav").write_bytes((tmp_path / "elsewhere/train-1.wav").read_bytes())
    assert actions(recipe, finished, "--dry-run") == dict.fromkeys(STAGES, "run")  # nor is the name what counts


def trained_folders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the name of the folder of each training of weights."""
    folders, train = [], WeightTrainer.train

    def noted(self: WeightTrainer) -> Any:
        folders.append(self.out.name)
        return train(self)

    monkeypatch.setattr(WeightTrainer, "train", noted)
    return folders


def test_another_penalty_keeps_what_does_not_depend_on_it(
    tiny: Path, whole: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = changed(("search", *AFTER_SEARCH)), contents(finished)
    dry = actions(tiny, finished, "--dry-run", "search.eta=0.0")
    assert dry == expected and contents(finished) == before
    folders = trained_folders(monkeypatch)
    assert actions(tiny, finished, "search.eta=0.0") == expected
    assert folders == ["search"]  # the supernet is as it was
    after = contents(finished)
    assert all(after[name] == old for name, old in before.items() if name.startswith(("train/", "float/")))
    assert after["search/supernet/model.safetensors"] == before["search/supernet/model.safetensors"]
    aside = {name.removeprefix("replaced-1/"): one for name, one in after.items() if name.startswith("replaced-1/")}
    assert aside and all(before[name] == one and "supernet" not in name for name, one in aside.items())
    assert aside["search/model.safetensors"] == before["search/model.safetensors"]
    assert aside["finetune/packed.safetensors"] == before["finetune/packed.safetensors"]
    assert (
        after["search/search.json"] != before["search/search.json"]
        and read(finished / "search/search.json")["eta"] == 0
    )
    assert actions(tiny, finished, "search.eta=0.0") == SKIPPED
    assert actions(tiny, finished) == expected
    for name in ("search/model.safetensors", "packed.safetensors", "finetune/packed.safetensors"):
        assert (finished / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("option", "trained"),
    [
        ("search.supernet_epochs=1", ["supernet", "search"]),
        ("search.ffn_width=[4,32]", ["supernet", "search"]),
        ("search.final_epochs=1", ["search"]),
        ("search.held_out=one.jsonl", ["search"]),
    ],
)
def test_what_the_supernet_depends_on_trains_it_anew(
    option: str, trained: list[str], tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = trained_folders(monkeypatch)
    done = actions(tiny, finished, option)
    assert folders == trained and (done["train"], done["search"], done["evaluate"]) == ("skipped", "run", "skipped")
    assert actions(tiny, finished, option) == SKIPPED


def test_other_data_are_searched_anew(tiny: Path, whole: Path, from_trained: Path) -> None:
    """Held-out data of the same name; audio for the importance of units, which a search from scratch does not read."""
    held_out = tiny.parent / "held.jsonl"
    text = held_out.read_text()
    held_out.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert actions(tiny, whole, "--dry-run") == changed(("search", *AFTER_SEARCH))
    held_out.write_text(text)
    calibration = "data.calibration=one.jsonl"
    assert actions(tiny, whole, calibration, "--dry-run")["search"] == "skipped"
    assert actions(tiny, from_trained, *TRAINED, calibration, "--dry-run") == changed(("search", *AFTER_SEARCH))


@pytest.mark.parametrize("name", ["model.safetensors", "search.json"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_result_that_is_gone_or_changed_is_made_again(
    name: str, is_gone: bool, tiny: Path, whole: Path, finished: Path
) -> None:
    path = finished / "search" / name
    path.unlink() if is_gone else path.write_bytes(b"spoilt")
    assert actions(tiny, finished)["search"] == "run"
    model = finished / "search/model.safetensors"
    assert model.read_bytes() == (whole / "search/model.safetensors").read_bytes()
    assert actions(tiny, finished) == SKIPPED


def stopped_at(owner: type, folder: str, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the update after so many in the folder of a stage end as by Ctrl-C."""
    step = owner.finish_update if owner is ArchitectureSearch else owner.prepare_update

    def stopping(self: Any) -> None:
        if self.out.name == folder and self.step == update:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(owner, step.__name__, stopping)


def cut_off_run(recipe: Path, out: Path, *options: str) -> None:
    """Runs with an interruption in each stage of the search."""
    for owner, folder in ((WeightTrainer, "supernet"), (ArchitectureSearch, "architecture"), (WeightTrainer, "search")):
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(owner, folder, 3, patch)
            done = mpq_run(recipe, out, *options)
            assert done.exit_code == 130 and "goes on where it stopped" in done.stderr, done.output
        inside = out / "search" / ("" if folder == "search" else folder)
        assert (inside / "state.pt").exists() and not (out / "float").exists()
        assert list(read(out / "run.json")["stages"]["search"]) == ["kept", "started"]
        dry = actions(recipe, out, "--dry-run", *options)
        assert dry["search"] == "resumed" and all(dry[name] == "run" for name in AFTER_SEARCH)


def test_what_was_cut_off_goes_on_and_gives_the_same(tiny: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut_off_run(tiny, out)
    assert actions(tiny, out) == dict.fromkeys(STAGES, "run") | {"train": "skipped", "search": "resumed"}
    for name in ("search/supernet/model.safetensors", "search/model.safetensors", "packed.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    first, second = (read(folder / "search/search.json")["architecture"] for folder in (out, whole))
    assert {key: value for key, value in first.items() if key not in ("seconds", "epochs")} == {
        key: value for key, value in second.items() if key not in ("seconds", "epochs")
    }
    assert results(out)["search"] == results(whole)["search"]
    assert actions(tiny, out) == SKIPPED


def test_options_that_change_in_between_keep_the_supernet_alone(tiny: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(WeightTrainer, "search", 3, patch)
        assert mpq_run(tiny, out, "search.eta=0.0").exit_code == 130
    with pytest.MonkeyPatch.context() as patch:
        folders = trained_folders(patch)
        assert actions(tiny, out)["search"] == "run" and folders == ["search"]
    name = "search/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_supernet_that_a_failure_left_behind_does_not_pass_for_another(
    tiny: Path, whole: Path, finished: Path
) -> None:
    def failing(_: ArchitectureSearch) -> None:
        raise MpqError("the loss is not finite")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArchitectureSearch, "choose", failing)
        done = mpq_run(tiny, finished, "search.ffn_width=[4,32]")
    assert done.exit_code == 2 and "the loss is not finite" in done.stderr
    assert (finished / "search/supernet/model.safetensors").exists()
    assert actions(tiny, finished)["search"] == "run"
    for name in ("search/model.safetensors", "search/supernet/model.safetensors"):
        assert (finished / name).read_bytes() == (whole / name).read_bytes()
    assert actions(tiny, finished) == SKIPPED


def test_a_search_may_begin_with_the_model_of_the_stage_train(tiny: Path, whole: Path, from_trained: Path) -> None:
    start = read(from_trained / "search/search.json")["checkpoint"]
    assert start["path"] == str(from_trained / "train/model.safetensors")
    models = [(folder / "search/model.safetensors").read_bytes() for folder in (whole, from_trained)]
    assert models[0] != models[1]
    assert results(from_trained)["search"]["widths"] == hidden_widths(from_trained / "search")
    assert actions(tiny, from_trained, *TRAINED) == SKIPPED
    imitating = actions(tiny, from_trained, *TRAINED, "search.loss=distillation", "--dry-run")
    assert imitating == changed(("search", *AFTER_SEARCH))


def test_a_search_from_the_trained_model_goes_on(tiny: Path, from_trained: Path, tmp_path: Path) -> None:
    cut_off_run(tiny, tmp_path / "run", *TRAINED)
    assert actions(tiny, tmp_path / "run", *TRAINED)["search"] == "resumed"
    for name in ("search/model.safetensors", "packed.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (from_trained / name).read_bytes()


def test_options_of_the_distillation_count_where_there_is_one(
    tiny: Path, finished: Path, from_trained: Path, tmp_path: Path
) -> None:
    other, out = "finetune.bound=2.0", tmp_path / "other"
    for folder, options in ((finished, ()), (from_trained, TRAINED)):
        assert actions(tiny, folder, *options, other, "--dry-run") == changed(("finetune", "compare"))
    options = (*TRAINED, "search.loss=distillation", "search.held_out=bare.jsonl", 'stages=["train","search"]')
    lines = [json.loads(line) for line in (tiny.parent / "held.jsonl").read_text().splitlines()]
    bare = [json.dumps({"audio_filepath": line["audio_filepath"]}) for line in lines]  # no transcripts are needed
    (tiny.parent / "bare.jsonl").write_text("\n".join(bare))
    assert actions(tiny, out, *options) == {"train": "run", "search": "run"}
    same = actions(tiny, out, *options, "finetune.save_minutes=3.0", "--dry-run")
    assert same == {"train": "skipped", "search": "skipped"}
    with pytest.MonkeyPatch.context() as patch:
        folders = trained_folders(patch)
        assert actions(tiny, out, *options, other) == {"train": "skipped", "search": "run"}
    assert folders == ["supernet", "search"]


def without_training(tiny: Path, name: str, **changes: str) -> Path:
    """Writes the recipe with other lines at its top, without the stage train, beside it."""
    stages = [stage for stage in STAGES if stage != "train"]
    lines = [f"{key} = {json.dumps(value)}" for key, value in ({"stages": stages} | changes).items()]
    path = tiny.parent / name
    path.write_text("\n".join([*lines, *tiny.read_text().splitlines()[1:]]) + "\n")
    return path


def test_without_a_trained_model_the_one_found_is_what_is_compared_with(
    tiny: Path, whole: Path, tmp_path: Path
) -> None:
    recipe, out = without_training(tiny, "scratch.toml"), tmp_path / "run"
    expected = {stage: "run" for stage in STAGES if stage != "train"}
    assert actions(recipe, out, "--dry-run") == expected and actions(recipe, out) == expected
    assert (out / "search/model.safetensors").read_bytes() == (whole / "search/model.safetensors").read_bytes()
    assert (out / "float/one/hyp.trn").read_bytes() == (whole / "searched/one/hyp.trn").read_bytes()
    assert set(results(out)["compare"]) == {"tests", "finetuned"} and not (out / "searched").exists()
    assert "ratio" not in results(out)["search"]
    table, size = mpq_run(recipe, out, "--quiet").stdout, os.path.getsize(out / "packed.safetensors")
    float_bytes = 4 * load_model(out / "search").parameter_counts()["total"]
    assert row(table, "float32")[1:3] == [str(float_bytes), "1"]
    assert row(table, "packed")[1:3] == [str(size), f"{float_bytes / size:.2f}"]
    assert all("searched" not in line for line in table.splitlines())
    assert set(actions(recipe, out).values()) == {"skipped"}
    (out / "search/model.safetensors").unlink()
    dry = actions(recipe, out, "--dry-run")  # the evaluation reads what the search will write
    assert all(dry[name] == "run" for name in expected if name != "allocate")


def test_a_search_may_begin_with_the_checkpoint_of_the_recipe(tiny: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "train", tiny.parent / "mine")
    recipe, out = without_training(tiny, "checkpoint.toml", checkpoint="mine"), tmp_path / "run"
    assert actions(recipe, out) == {stage: "run" for stage in STAGES if stage != "train"}
    baseline, model = tiny.parent / "mine/model.safetensors", out / "search/model.safetensors"
    assert read(out / "search/search.json")["checkpoint"]["path"] == str(baseline)
    assert (out / "float/one/hyp.trn").read_bytes() == (whole / "float/one/hyp.trn").read_bytes()
    found = results(out)["search"]
    assert (found["baseline_bytes"], found["size_bytes"]) == (os.path.getsize(baseline), os.path.getsize(model))
    assert found["ratio"] == os.path.getsize(baseline) / os.path.getsize(model)
    assert set(actions(recipe, out, "finetune.bound=2.0", "--dry-run").items()) >= {
        ("search", "skipped"), ("finetune", "run"),
    }  # fmt: skip
    shutil.copy(whole / "search/model.safetensors", baseline)
    dry = actions(recipe, out, "--dry-run")
    assert (dry["search"], dry["evaluate"]) == ("run", "run")


def test_a_search_of_an_archive_is_compared_with_its_parameters_in_float32(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path
) -> None:
    recipe, out = tmp_path / "nemo.toml", tmp_path / "run"
    recipe.write_text(
        'stages = ["search", "evaluate", "sensitivity", "allocate", "pack", "compare"]\n'
        f'checkpoint = "{tiny_archive}"\n'
        f'[data]\ntrain = ["{tiny_manifest}"]\ndev = "{tiny_manifest}"\ntest = {{ x = "{tiny_manifest}" }}\n'
        "[train]\nepochs = 1\nworkers = 0\nselect = 'last'\n[search]\neta = 1e4\nepochs = 2\nlearning_rate = 1.0\n"
        "[finetune]\nctc_weight = 1.0\n[sensitivity]\nbits = [2, 4, 8]\n[allocate]\naverage_bits = 4\n"
    )
    assert set(actions(recipe, out).values()) == {"run"}
    table, float_bytes = (
        mpq_run(recipe, out, "--quiet").stdout,
        4 * load_model(tiny_archive).parameter_counts()["total"],
    )
    assert row(table, "float32")[1:3] == [str(float_bytes), "1"]
    for name, file in (("searched", "search/model.safetensors"), ("packed", "packed.safetensors")):
        size = os.path.getsize(out / file)
        assert row(table, name)[1:3] == [str(size), f"{float_bytes / size:.2f}"]
    assert actions(recipe, out, "finetune.bound=2.0", "--dry-run")["search"] == "run"  # the archive is the teacher
