"""The stage search of `mpq run`: what follows works on the model found, and is compared with the one before it."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import stamps
from tiny_search_runs import (
    AFTER_SEARCH,
    SKIPPED,
    TRAINED,
    WIDTHS,
    actions,
    changed,
    contents,
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
from mpq.loading import load_model

__all__ = ["tiny", "whole"]  # fixtures


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
    before, written = contents(finished), stamps(finished)
    assert actions(tiny, finished) == SKIPPED and actions(tiny, finished, "--dry-run") == SKIPPED
    assert actions(tiny, finished, "train.save_minutes=3.0", "search.supernet=elsewhere") == SKIPPED
    assert contents(finished) == before and stamps(finished) == written
    monkeypatch.setattr("mpq.pipeline.stages.__version__", "99.0")  # an upgrade neither trains nor searches anew
    done = actions(tiny, finished, "--dry-run")
    assert {name for name, action in done.items() if action == "skipped"} == {"train", "search"}


def test_data_that_are_copied_or_moved_are_the_same_data(tiny: Path, finished: Path, tmp_path: Path) -> None:
    """Other paths, times and inodes, the same contents: nothing is done again, not even a supernet."""
    before, written = contents(finished), stamps(finished)
    (tmp_path / "data").mkdir()
    for path in tiny.parent.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / "data" / path.name)
    assert actions(tiny, finished, f"data.root={tmp_path}/data") == SKIPPED
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    recipe = tmp_path / "elsewhere/recipe.toml"
    assert actions(recipe, finished) == SKIPPED
    assert contents(finished) == before and stamps(finished) == written
    (tmp_path / "elsewhere/train-0.wav").write_bytes((tmp_path / "elsewhere/train-1.wav").read_bytes())
    assert actions(recipe, finished, "--dry-run") == dict.fromkeys(STAGES, "run")  # nor is the name what counts


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
        pytest.param("search.supernet_epochs=1", ["supernet", "search"], marks=pytest.mark.slow),
        ("search.ffn_width=[4,32]", ["supernet", "search"]),
        pytest.param("search.final_epochs=1", ["search"], marks=pytest.mark.slow),
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


@pytest.mark.parametrize("name", ["model.safetensors", pytest.param("search.json", marks=pytest.mark.slow)])
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
