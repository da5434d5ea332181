"""The stage search of `mpq run` interrupted, and begun with a trained model, a checkpoint or an archive."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_search_runs import (
    AFTER_SEARCH,
    SKIPPED,
    TRAINED,
    actions,
    changed,
    hidden_widths,
    mpq_run,
    read,
    results,
    row,
    tiny,
    trained_folders,
    whole,
)

from mpq.config import STAGES
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.search.loop import ArchitectureSearch
from mpq.training.weights import WeightTrainer

__all__ = ["tiny", "whole"]  # fixtures


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
