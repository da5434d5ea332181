"""`mpq run`: every stage once, then only what changed; interrupted, resumed, dry, refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import FILES, SKIPPED, STAGES, TARGET_MB, actions, contents, mpq_run, said, stages, stamps

from mpq.errors import MpqError
from mpq.scoring import evaluate as evaluate_module
from mpq.training import weights as weight_loop


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
        figures = record["compare"]["result"]["tests"][name]
        assert comparison["lossless"] == figures["lossless"] and comparison["detectable"] == figures["detectable"]
        assert comparison["non_inferiority"] == {key: figures[key] for key in ("margin", "upper", "non_inferior")}
        assert comparison["a"]["name"] == "float32" and comparison["b"]["name"] == "packed"
    assert json.loads((whole / "sensitivity.json").read_text())["bits"] == [2, 4, 8]


def test_a_second_run_does_nothing(tiny: Path, finished: Path) -> None:
    before, written = contents(finished), stamps(finished)
    assert actions(tiny, finished) == SKIPPED
    assert actions(tiny, finished, "--dry-run") == SKIPPED
    done = mpq_run(tiny, finished, "--quiet")
    assert done.stdout.count("skipped") == 6 and done.stderr == ""
    pack = stages(finished)["pack"]["result"]
    assert str(pack["size_bytes"]) in done.stdout and f"{pack['ratio']:.2f}" in done.stdout
    assert "one WER %" in done.stdout and "two WER %" in done.stdout
    assert contents(finished) == before and stamps(finished) == written


def test_what_is_replaced_is_set_aside_and_named(tiny: Path, finished: Path) -> None:
    old = contents(finished)
    for number, alpha in enumerate((0.01, 0.02), 1):
        done = mpq_run(tiny, finished, "--set", f"compare.alpha={alpha}")
        assert done.exit_code == 0
        (line,) = (line for line in said(done) if line.startswith("compare: "))
        before = 0.05 if number == 1 else 0.01
        assert f"its inputs have changed (compare.alpha: {before} there, {alpha} now)" in line
        assert line.endswith(f"what was there before is now in {finished / f'replaced-{number}'}")
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
    (finished / "run.json").write_text(json.dumps({"format": "mpq.run/1", "stages": {"train": {"started": 1}}}))
    done = mpq_run(tiny, finished)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and "run.json: " in done.stderr
    (finished / "run.json").unlink()  # as it says; the training is kept
    before = stamps(finished / "train")
    assert actions(tiny, finished) == dict.fromkeys(STAGES, "run")
    assert stamps(finished / "train")["model.safetensors"] == before["model.safetensors"]


def test_results_that_are_not_on_record_are_set_aside(tiny: Path, finished: Path) -> None:
    """Somebody may have worked in the folder with the other commands, or deleted the record."""
    (finished / "run.json").unlink()
    (finished / "allocation.json").write_text("of a refinement of hours")
    before = contents(finished)
    done = mpq_run(tiny, finished)
    assert done.exit_code == 0
    for line in said(done):
        assert line.startswith("train: ") or line.endswith(f"what was there before is now in {finished}/replaced-1")
    assert contents(finished / "replaced-1") == {
        name: content for name, content in before.items() if not name.startswith("train/")
    }
    assert actions(tiny, finished) == SKIPPED
