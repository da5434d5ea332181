"""What each stage depends on, what it writes, and what is done anew when something of that changes."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from tiny_runs import SKIPPED, STAGES, actions, contents, mpq_run
from tiny_runs import stages as recorded

from mpq import config
from mpq.cli.main import main
from mpq.config import Recipe
from mpq.identity import Inputs
from mpq.pipeline import stages
from mpq.pipeline.run import run
from mpq.pipeline.setting import Setting


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("compare.alpha=0.01", {"compare"}),
        ("decode.beam_size=3", {"evaluate", "compare"}),
        ("sensitivity.bits=[2,4]", {"sensitivity", "allocate", "pack", "compare"}),
    ],
)
def test_an_option_repeats_what_depends_on_it(tiny: Path, finished: Path, option: str, expected: set[str]) -> None:
    done = actions(tiny, finished, "--set", option, "--dry-run")
    assert {name for name, action in done.items() if action == "run"} == expected


def test_a_new_target_repeats_what_depends_on_it(tiny: Path, finished: Path) -> None:
    expected = SKIPPED | dict.fromkeys(("allocate", "pack", "compare"), "run")
    old = contents(finished)
    dry = actions(tiny, finished, "--set", "allocate.target_mb=0.009", "--dry-run")
    assert dry == expected and contents(finished) == old
    assert actions(tiny, finished, "--set", "allocate.target_mb=0.009") == expected
    assert os.path.getsize(finished / "packed.safetensors") <= 0.009 * 2**20 < len(old["packed.safetensors"])
    new = contents(finished)
    changed = {name for name, content in old.items() if new[name] != content}
    assert {"allocation.json", "packed.safetensors", "run.json"} <= changed
    assert not any(name.startswith(("train/", "float/", "sensitivity")) for name in changed)
    aside = {name: content for name, content in new.items() if name not in old}  # what was there before, whole
    assert aside == {
        f"replaced-1/{name}": content
        for name, content in old.items()
        if name.startswith(("allocation", "packed", "comparison-"))
    }


def test_the_level_of_the_tests_is_the_recipes(tiny: Path, finished: Path) -> None:
    assert actions(tiny, finished, "--set", "compare.alpha=0.01") == SKIPPED | {"compare": "run"}
    for name in ("one", "two"):
        assert json.loads((finished / f"comparison-{name}.json").read_text())["alpha"] == 0.01


def test_other_test_audio_of_the_same_size_repeats_the_evaluations(tiny: Path, finished: Path) -> None:
    path = tiny.parent / "two-1.wav"
    stat, audio = path.stat(), path.read_bytes()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert actions(tiny, finished, "--dry-run") == SKIPPED  # another time is no other audio
    path.write_bytes(audio[:-2] + bytes([audio[-2] ^ 1, audio[-1]]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # nor is it hidden by the old time
    try:
        expected = SKIPPED | {"evaluate": "run", "compare": "run"}
        assert actions(tiny, finished, "--dry-run") == expected
        assert actions(tiny, finished) == expected
        assert actions(tiny, finished) == SKIPPED
    finally:
        path.write_bytes(audio)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("float/two/hyp.trn", "evaluate"),
        ("sensitivity.json", "sensitivity"),
        ("allocation.json", "allocate"),
        ("packed.safetensors", "pack"),
        ("comparison-two.json", "compare"),
    ],
)
def test_a_result_that_is_gone_or_changed_is_made_again(
    tiny: Path, whole: Path, finished: Path, name: str, stage: str
) -> None:
    for spoil in (Path.unlink, lambda path: path.write_bytes(b"{}")):
        spoil(finished / name)
        dry = actions(tiny, finished, "--dry-run")
        assert dry[stage] == "run" and (dry["compare"] == "run" or stage != "evaluate")
        done = actions(tiny, finished)
        assert done[stage] == "run" and all(done[other] == "skipped" for other in STAGES[: STAGES.index(stage)])
        said = (finished / name).read_text(errors="replace").replace(str(finished), str(whole))
        assert said == (whole / name).read_text(errors="replace")  # but for the path of the checkpoint
    assert actions(tiny, finished) == SKIPPED


def test_a_model_that_is_gone_is_trained_again_and_a_changed_one_is_an_error(tiny: Path, finished: Path) -> None:
    model = finished / "train/model.safetensors"
    weights = model.read_bytes()
    model.write_bytes(b"mine")
    done = mpq_run(tiny, finished)
    assert done.exit_code == 2 and "model.safetensors: changed since the training; put it back" in done.stderr
    assert model.read_bytes() == b"mine"
    model.unlink()
    done = actions(tiny, finished)
    assert done["train"] == "run" and model.read_bytes() == weights


def test_a_finished_training_is_not_overwritten(tiny: Path, finished: Path) -> None:
    """Other options or data are refused with a remedy; going back to the old ones is as if nothing had been."""
    before = contents(finished)
    for option in ("train.epochs=3", 'data.train=["one.jsonl"]', "seed=1"):
        done = mpq_run(tiny, finished, "--set", option)
        assert done.exit_code == 2 and done.stdout == "", done.output
        assert "holds a finished training with other options or data" in done.stderr
        assert "choose another --out, or delete the folder" in done.stderr
    after = contents(finished)
    assert after == before
    assert actions(tiny, finished) == SKIPPED
    assert "started" not in recorded(finished)["evaluate"]


def test_the_seed_of_the_command_line_is_the_recipes(tiny: Path, finished: Path) -> None:
    assert actions(tiny, finished, "--seed", 0) == SKIPPED
    assert actions(tiny, finished, "--seed", 3, "--dry-run")["train"] == "run"


def test_only_the_stages_that_are_asked_for(tiny: Path, whole: Path, tmp_path: Path) -> None:
    """A part of the pipeline from a trained checkpoint folder; with the same data it makes the same packed file."""
    options = ["--set", 'stages=["sensitivity","allocate","pack"]', "--set", f"checkpoint={whole}/train"]
    assert actions(tiny, tmp_path / "part", *options) == dict.fromkeys(("sensitivity", "allocate", "pack"), "run")
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == [
        "allocation.json", "packed.safetensors", "run.json", "sensitivity.json",
    ]  # fmt: skip
    assert (tmp_path / "part/packed.safetensors").read_bytes() == (whole / "packed.safetensors").read_bytes()


def test_a_recipe_with_a_nemo_checkpoint(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    recipe = tmp_path / "nemo.toml"
    recipe.write_text(
        'stages = ["evaluate", "sensitivity", "allocate", "pack", "compare"]\n'
        f'checkpoint = "{tiny_archive}"\n[data]\ncalibration = "{tiny_manifest}"\ntest = {{ x = "{tiny_manifest}" }}\n'
        '[sensitivity]\nbits = [2, 4, 8]\noutput = "ctc"\n[allocate]\naverage_bits = 4\n'
    )
    assert actions(recipe, tmp_path / "run") == {name: "run" for name in STAGES if name != "train"}
    chain = ["allocate", str(tmp_path / "run/sensitivity.json"), "--average-bits", "4", "--out", str(tmp_path / "a")]
    assert CliRunner().invoke(main, chain).exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "run/allocation.json").read_bytes()
    assert actions(recipe, tmp_path / "run")["evaluate"] == "skipped"
    recipe.write_text(recipe.read_text().replace(str(tiny_archive), "gone.nemo"))
    done = mpq_run(recipe, tmp_path / "run")
    assert done.exit_code == 2 and f"checkpoint: {tmp_path}/gone.nemo: no such file" in done.stderr


class Greet(stages.Stage):
    """A toy: it greets the recipe's seed."""

    name: ClassVar[str] = "greet"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after, self.outputs = (), (self.out / "greeting.txt",)

    def inputs(self) -> Inputs:
        return Inputs.of(seed=self.recipe.seed)

    def act(self) -> dict[str, Any]:
        self.outputs[0].write_text(f"hello {self.recipe.seed}")
        return {"words": 2}


def test_every_stage_of_the_schema_has_its_class_in_its_order() -> None:
    assert tuple(stage.name for stage in stages.STAGES) == config.STAGES


def test_a_new_stage_is_a_class_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is put into `STAGES`, the name into the schema; it is then run, skipped and set aside as all are."""
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, Greet))

    def done(seed: int) -> tuple[str, dict[str, Any]]:
        recipe = Recipe().model_copy(update={"stages": ["greet"], "seed": seed})
        (report,) = run(recipe, tmp_path, device="cpu", quiet=True).stages
        return report.action, report.result

    assert [done(0), done(0), done(1)] == [("run", {"words": 2}), ("skipped", {"words": 2}), ("run", {"words": 2})]
    assert (tmp_path / "greeting.txt").read_text() == "hello 1"
    assert (tmp_path / "replaced-1/greeting.txt").read_text() == "hello 0"
