"""`mpq run`: every stage once, then only what changed; interrupted, resumed, dry, refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_training import TEXTS, write_recipe, write_speech

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.scoring import evaluate as evaluate_module
from mpq.training import weights as weight_loop

STAGES = tuple(Recipe().stages)
TARGET_MB = 0.0105
FILES = (
    *("train/model.safetensors", "train/training.json", "train/recipe.json", "train/log.jsonl"),
    *(f"{model}/{name}/{file}" for model in ("float", "packed") for name in ("one", "two")
      for file in ("ref.trn", "hyp.trn", "metrics.json")),
    *("sensitivity.json", "allocation.json", "packed.safetensors", "comparison-one.json", "comparison-two.json"),
    "run.json",
)  # fmt: skip
SKIPPED = dict.fromkeys(STAGES, "skipped")


def mpq_run(recipe: Path, out: Path, *options: object) -> Result:
    return CliRunner().invoke(main, ["run", str(recipe), "--out", str(out), "--device", "cpu", *map(str, options)])


def said(done: Result) -> list[str]:
    """Returns what `mpq run` said of its stages, on stderr."""
    return [line.removeprefix("mpq run: ") for line in done.stderr.splitlines() if line.startswith("mpq run: ")]


def actions(recipe: Path, out: Path, *options: object) -> dict[str, str]:
    """Returns what a run did with each stage, as its JSON and its table say."""
    done = mpq_run(recipe, out, "--json", *options)
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert raw["format"] == "mpq.run/1" and raw["dry_run"] == ("--dry-run" in options)
    for stage in raw["stages"]:  # each stage says on stderr what becomes of it
        line = next(line for line in said(done) if line.startswith(f"{stage['name']}: "))
        assert stage["reason"] in line and line.endswith("; skipped") == (stage["action"] == "skipped")
    return {stage["name"]: stage["action"] for stage in raw["stages"]}


def stages(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())["stages"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a hybrid model of one block, its data beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_speech(folder)
    for name, texts in (("dev.jsonl", TEXTS[:3]), ("one.jsonl", TEXTS[3:7]), ("two.jsonl", TEXTS[7:])):
        write_speech(folder, texts, name)
    changes = {"data.test__one": "one.jsonl", "data.test__two": "two.jsonl"}
    return write_recipe(
        folder / "recipe.toml", train__epochs=2, sensitivity__bits=[2, 4, 8], allocate__target_mb=TARGET_MB,
        decode__method="prefix", decode__beam_size=2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Path:
    """The folder of an uninterrupted run."""
    out = tiny.parent / "whole"
    assert actions(tiny, out) == dict.fromkeys(STAGES, "run")
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_every_result_is_there_and_the_size_is_kept(whole: Path) -> None:
    assert all((whole / name).is_file() for name in FILES)
    assert not [path for path in whole.rglob("*") if path.suffix in (".partial", ".journal", ".pt")]
    size = os.path.getsize(whole / "packed.safetensors")
    record = stages(whole)
    assert size == record["pack"]["result"]["size_bytes"] <= TARGET_MB * 2**20
    # within one step of the target: the next point of the frontier would be above it
    frontier = [point[0] for point in json.loads((whole / "allocation.json").read_text())["frontier"]]
    assert size == max(one for one in frontier if one <= TARGET_MB * 2**20)
    assert list(record) == list(STAGES) and all("started" not in one for one in record.values())
    for model, stage in (("float", "evaluate"), ("packed", "compare")):
        for name in ("one", "two"):
            metrics = json.loads((whole / model / name / "metrics.json").read_text())
            assert metrics["decode"]["method"] == "prefix" and metrics["decode"]["beam_size"] == 2
            assert metrics["wer"] == record[stage]["result"]["tests"][name]["wer"]
    for name in ("one", "two"):
        comparison = json.loads((whole / f"comparison-{name}.json").read_text())
        assert comparison["lossless"] == record["compare"]["result"]["tests"][name]["lossless"]
        assert comparison["a"]["name"] == "float32" and comparison["b"]["name"] == "packed"
    assert json.loads((whole / "sensitivity.json").read_text())["bits"] == [2, 4, 8]


def test_a_second_run_does_nothing(tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(finished)
    monkeypatch.setattr("mpq.pipeline.stages.train", None)
    monkeypatch.setattr("mpq.pipeline.stages.evaluate", None)
    assert actions(tiny, finished) == SKIPPED
    assert actions(tiny, finished, "--dry-run") == SKIPPED
    done = mpq_run(tiny, finished, "--quiet")
    assert done.stdout.count("skipped") == 6 and done.stderr == ""
    pack = stages(finished)["pack"]["result"]
    assert str(pack["size_bytes"]) in done.stdout and f"{pack['ratio']:.2f}" in done.stdout
    assert "one WER %" in done.stdout and "two WER %" in done.stdout
    assert contents(finished) == before


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


def test_what_is_replaced_is_set_aside_and_named(tiny: Path, finished: Path) -> None:
    old = contents(finished)
    for number, alpha in enumerate((0.01, 0.02), 1):
        done = mpq_run(tiny, finished, "--set", f"compare.alpha={alpha}")
        assert done.exit_code == 0
        (line,) = (line for line in said(done) if line.startswith("compare: "))
        before = 0.05 if number == 1 else 0.01
        assert f"its inputs have changed (compare.alpha: {before} there, {alpha} now)" in line
        assert line.endswith(f"what it wrote before is now in {finished / f'replaced-{number}'}")
        kept = {name: one for name, one in old.items() if name.startswith(("packed/", "comparison-"))}
        assert contents(finished / f"replaced-{number}") == kept
        old = contents(finished)


def test_a_stage_that_is_refused_is_not_cut_off_and_its_result_is_put_back(
    tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise MpqError("no")

    before = contents(finished)
    with monkeypatch.context() as patch:
        patch.setattr("mpq.pipeline.stages.compare", refused)
        patch.setattr("mpq.pipeline.stages.evaluate", lambda *_, **__: refused())
        done = mpq_run(tiny, finished, "--set", "compare.alpha=0.01")
    assert done.exit_code == 2 and contents(finished) == before
    assert actions(tiny, finished) == SKIPPED
    (finished / "run.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("mpq.pipeline.stages.measure_sensitivity", refused)
        assert mpq_run(tiny, finished).exit_code == 2
    done = mpq_run(tiny, finished, "--dry-run")
    assert done.exit_code == 0 and "sensitivity: not done yet" in said(done)


def test_a_stage_that_fails_on_its_way_goes_on(tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "float/two/metrics.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("mpq.pipeline.stages.evaluation_figures", lambda _: (_ for _ in ()).throw(MpqError("no room")))
        assert mpq_run(tiny, finished).exit_code == 2
    assert stages(finished)["evaluate"]["started"]["stopped"] == "ended in an error"
    assert actions(tiny, finished, "--dry-run")["evaluate"] == "resumed"
    assert actions(tiny, finished)["evaluate"] == "resumed"


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


def cut_off(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Makes one call of a function, counted from 1, end as by Ctrl-C."""
    function, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def test_what_was_cut_off_goes_on_and_gives_the_same(
    tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, updates = tmp_path / "run", stages(whole)["train"]["result"]["epochs"]
    steps = [json.loads(line) for line in (whole / "train/log.jsonl").read_text().splitlines()][-1]["step"]
    cuts = [
        ("train", weight_loop.WeightTrainer, "_update", steps // updates + 2),  # in the second epoch
        ("evaluate", evaluate_module, "read_batch", 2),
        ("compare", evaluate_module, "measure", 4),  # after two of evaluate and one of compare
    ]
    for stage, owner, name, at in cuts:
        with monkeypatch.context() as patch:
            cut_off(patch, owner, name, at)
            done = mpq_run(tiny, out)
            assert done.exit_code == 130 and done.stdout == "" and "goes on where it stopped" in done.stderr
        started = stages(out)[stage]
        assert list(started) == ["started"] and set(started["started"]) == {"fingerprint", "inputs", "seconds"}
        dry = actions(tiny, out, "--dry-run")
        place = STAGES.index(stage)
        before = dict.fromkeys(STAGES[:place], "skipped")
        assert dry == before | {stage: "resumed"} | dict.fromkeys(STAGES[place + 1 :], "run") | (
            {"sensitivity": "run"} if stage == "evaluate" else {}
        )
        assert stages(out)[stage] == started
    record = json.loads((out / "run.json").read_text())
    record["stages"]["compare"]["started"]["seconds"] = 1000.0  # what it took before it was cut off counts
    (out / "run.json").write_text(json.dumps(record))
    assert actions(tiny, out) == SKIPPED | {"compare": "resumed"}
    assert stages(out)["compare"]["seconds"] >= 1000 and stages(out)["pack"]["seconds"] < 1000
    same = [name for name in FILES if not name.endswith(("metrics.json", "run.json", "training.json", "log.jsonl"))]
    for name in same:
        if name not in ("sensitivity.json", "allocation.json", "train/recipe.json"):  # those have the run's path
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    results = [{name: one["result"] for name, one in stages(folder).items()} for folder in (out, whole)]
    assert results[0] == results[1]
    assert actions(tiny, out) == SKIPPED


def test_run_json_is_whole_at_any_time(tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "run.json").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)  # killed before the new file is in place
    done = mpq_run(tiny, finished, "--set", "compare.alpha=0.01")
    assert isinstance(done.exception, ZeroDivisionError) and (finished / "run.json").read_bytes() == before


def test_a_dry_run_makes_no_folder(tiny: Path, tmp_path: Path) -> None:
    assert actions(tiny, tmp_path / "new", "--dry-run") == dict.fromkeys(STAGES, "run")
    done = mpq_run(tiny, tmp_path / "new", "--dry-run", "--quiet")
    assert "what a run would do" in done.stdout and "not done yet" in done.stdout and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


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
    assert "started" not in stages(finished)["evaluate"]


def test_the_seed_of_the_command_line_is_the_recipes(tiny: Path, finished: Path) -> None:
    assert actions(tiny, finished, "--seed", 0) == SKIPPED
    assert actions(tiny, finished, "--seed", 3, "--dry-run")["train"] == "run"


def test_what_would_fail_after_the_training_is_told_before_it(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"audio_filepath": 3}\n')
    (tmp_path / "worse.jsonl").write_text("x\n")
    done = mpq_run(
        tiny, tmp_path / "run", "--set", f"data.test.one={tmp_path}/bad.jsonl",
        "--set", "sensitivity.clip=percentile:9", "--set", f"data.calibration={tmp_path}/worse.jsonl",
    )  # fmt: skip
    assert done.exit_code == 2 and not (tmp_path / "run").exists()
    for words in ("bad.jsonl:1: ", "worse.jsonl:1: ", "[sensitivity] clip: expected none, mse, mae or percentile:P"):
        assert done.stderr.count(words) == 1, done.stderr
    done = mpq_run(tiny, tmp_path / "run", "--device", "tpu", "--dry-run")
    assert done.exit_code == 2 and "--device" in done.stderr


def test_run_json_that_is_no_record_is_refused(tiny: Path, finished: Path) -> None:
    record = stages(finished)
    broken = [
        "{",
        json.dumps({"format": "mpq.run/2", "stages": {}}),
        *(json.dumps({"format": "mpq.run/1", "stages": one}) for one in (3, {"train": 3}, {"train": {"started": 1}})),
        json.dumps({"format": "mpq.run/1"}),
        json.dumps({"format": "mpq.run/1", "stages": record | {"pack": {"fingerprint": "x"}}}),
    ]
    for text in broken:
        (finished / "run.json").write_text(text)
        done = mpq_run(tiny, finished)
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and "run.json: " in done.stderr, text
    (finished / "run.json").unlink()  # as it says; the training is kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_loop.WeightTrainer, "run", None)
        assert actions(tiny, finished) == dict.fromkeys(STAGES, "run")


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
