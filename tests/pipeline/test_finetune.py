"""The stage finetune of `mpq run`: done once, anew when its inputs change, gone on with after an interruption."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_finetune import OPTIONS, write_hybrid
from tiny_runs import stamps
from tiny_training import write_speech

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.finetuning.loop import Finetuner
from mpq.loading import load_model

STAGES = ("evaluate", "sensitivity", "allocate", "pack", "finetune", "compare")
SKIPPED = dict.fromkeys(STAGES, "skipped")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a trained model, its data beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_speech(folder, ("abc", "bad", "deed", "bed cab"))
    write_speech(folder, ("abed", "a bee"), "dev.jsonl")
    write_hybrid(folder)
    lines = [f"stages = {json.dumps(STAGES)}", 'checkpoint = "hybrid"', "[data]", 'train = ["train.jsonl"]']
    lines += ['dev = "dev.jsonl"', 'test = { one = "dev.jsonl" }', "[sensitivity]", "bits = [2, 3, 4, 8]"]
    lines += ["[allocate]", "average_bits = 3", "[finetune]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in OPTIONS.items()]
    lines += ["[finetune_augment]", "speed = [0.9, 1.0]"]
    (folder / "recipe.toml").write_text("\n".join(lines) + "\n")
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Path:
    out = tiny.parent / "whole"
    assert actions(tiny, out) == dict.fromkeys(STAGES, "run")
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def mpq_run(recipe: Path, out: Path, *options: object) -> Result:
    return CliRunner().invoke(main, ["run", str(recipe), "--out", str(out), "--device", "cpu", *map(str, options)])


def actions(recipe: Path, out: Path, *options: object) -> dict[str, str]:
    done = mpq_run(recipe, out, "--json", *options)
    assert done.exit_code == 0, done.output
    return {stage["name"]: stage["action"] for stage in json.loads(done.stdout)["stages"]}


def results(out: Path) -> dict[str, Any]:
    return {name: one.get("result") for name, one in json.loads((out / "run.json").read_text())["stages"].items()}


def test_the_figures_of_the_run_are_those_of_the_folder(tiny: Path, whole: Path) -> None:
    found = results(whole)
    (size,) = json.loads((whole / "finetune/finetune.json").read_text())["sizes"]
    assert found["finetune"] == {"size_bytes": size["size_bytes"], "ratio": size["ratio"], "dev_wer": size["wer"]}
    assert size["size_bytes"] == found["pack"]["size_bytes"] == (whole / "finetune/packed.safetensors").stat().st_size
    assert load_model(whole / "finetune").quantized_bits == load_model(whole / "packed.safetensors").quantized_bits
    for model, tests in (("packed", found["compare"]["tests"]), ("finetuned", found["compare"]["finetuned"])):
        metrics = json.loads((whole / model / "one/metrics.json").read_text())
        name = "comparison-one.json" if model == "packed" else "comparison-finetuned-one.json"
        comparison = json.loads((whole / name).read_text())
        assert metrics["wer"] == tests["one"]["wer"] == comparison["b"]["wer"] and comparison["b"]["name"] == model
        assert tests["one"]["lossless"] == comparison["lossless"]
    assert found["compare"]["finetuned"]["one"]["wer"] == size["wer"]  # the test set is the held-out one
    recipe = Recipe.model_validate_json((whole / "finetune/recipe.json").read_text())
    assert recipe.finetune_augment.speed == [0.9, 1.0] and recipe.finetune.epochs == OPTIONS["epochs"]
    table = mpq_run(tiny, whole, "--quiet").stdout
    assert "fine-tuned" in table and table.count(str(size["size_bytes"])) == 2


def test_a_second_run_does_nothing(tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stamps(finished)
    assert actions(tiny, finished) == SKIPPED
    assert actions(tiny, finished, "--set", "finetune.save_minutes=3.0", "--set", "finetune.workers=1") == SKIPPED
    assert stamps(finished) == before
    monkeypatch.setattr("mpq.pipeline.stages.__version__", "99.0")  # an upgrade does not train anew
    assert actions(tiny, finished) == dict.fromkeys(STAGES, "run") | {"finetune": "skipped"}
    assert stamps(finished / "finetune") == {
        name.removeprefix("finetune/"): one for name, one in before.items() if name.startswith("finetune/")
    }


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("finetune.learning_rate=0.1", {"finetune", "compare"}),
        ("finetune_augment.speed=[1.1]", {"finetune", "compare"}),
        ("allocate.average_bits=4", {"allocate", "pack", "finetune", "compare"}),
    ],
)
def test_a_change_trains_anew(option: str, expected: set[str], tiny: Path, whole: Path, finished: Path) -> None:
    before = (whole / "finetune/packed.safetensors").read_bytes()
    assert actions(tiny, finished, "--set", option) == SKIPPED | dict.fromkeys(expected, "run")
    assert (finished / "finetune/packed.safetensors").read_bytes() != before
    assert actions(tiny, finished, "--set", option) == SKIPPED
    assert actions(tiny, finished) == SKIPPED | dict.fromkeys(expected, "run")
    assert (finished / "finetune/packed.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["packed.safetensors", "finetune.json"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_result_that_is_gone_or_changed_is_made_again(
    name: str, is_gone: bool, tiny: Path, whole: Path, finished: Path
) -> None:
    path = finished / "finetune" / name
    path.unlink() if is_gone else path.write_bytes(b"spoilt")
    found = actions(tiny, finished)
    assert {key for key, value in found.items() if value == "run"} - {"compare"} == {"finetune"}
    packed = finished / "finetune/packed.safetensors"
    assert packed.read_bytes() == (whole / "finetune/packed.safetensors").read_bytes()
    assert actions(tiny, finished) == SKIPPED


@pytest.mark.parametrize("name", ["comparison-finetuned-one.json", "finetuned/one/hyp.trn"])
def test_a_comparison_that_is_gone_is_made_again(name: str, tiny: Path, whole: Path, finished: Path) -> None:
    (finished / name).unlink()
    assert actions(tiny, finished) == SKIPPED | {"compare": "run"}
    assert (finished / name).read_bytes() == (whole / name).read_bytes()


def test_what_was_cut_off_goes_on(tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, finish, steps = tmp_path / "run", Finetuner.finish_update, []

    def interrupting(tuner: Finetuner) -> None:
        finish(tuner)
        steps.append(tuner.step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Finetuner, "finish_update", interrupting)
    done = mpq_run(tiny, out, "--set", "finetune.save_minutes=1e-9")
    assert done.exit_code == 130 and "goes on where it stopped" in done.stderr
    expected = SKIPPED | {"finetune": "resumed", "compare": "run"}
    assert actions(tiny, out, "--dry-run") == expected
    assert actions(tiny, out) == expected
    assert steps[:3] == [0, 1, 1] and steps[2:] == sorted(set(steps))[1:]  # the update under way alone is done again
    packed = "finetune/packed.safetensors"
    assert (out / packed).read_bytes() == (whole / packed).read_bytes()
    monkeypatch.setattr(Finetuner, "finish_update", finish)
    steps.clear()


def test_after_a_move_the_calibration_audio_is_found_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding needs the audio that the sensitivities were measured on, and the cache may have lost what it said."""
    folder = tmp_path / "one"
    folder.mkdir()
    for path in tiny.parent.iterdir():
        if path.name != "whole":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    stages = 'stages=["sensitivity","allocate","pack","finetune"]'
    assert set(actions(folder / tiny.name, tmp_path / "run", "--set", stages).values()) == {"run"}
    moved = folder.rename(tmp_path / "two") / tiny.name
    assert set(actions(moved, tmp_path / "run", "--set", stages).values()) == {"skipped"}
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "empty"))
    done = actions(moved, tmp_path / "run", "--set", stages, "--set", "allocate.average_bits=4")
    assert done == {"sensitivity": "skipped"} | dict.fromkeys(("allocate", "pack", "finetune"), "run")
