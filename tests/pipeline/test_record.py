"""`run.json` is read as it was written, and what is none is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpq.errors import MpqError
from mpq.pipeline.record import RunRecord, RunResult, StageReport

DONE = {"fingerprint": "f", "inputs": {"seed": 1}, "seconds": 2.5, "outputs": {"a": "sha"}, "result": {"wer": 0.1}}
BEGUN = {"kept": {"search/supernet": {"seed": 1}}, "started": {"fingerprint": "g", "inputs": {}, "seconds": 1.5}}


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run/run.json"
    record = RunRecord(path)
    assert record.of("train") == {} and not path.parent.exists()
    record.write("train", DONE)
    record.write("search", BEGUN)
    again = RunRecord(path)
    assert (again.of("train"), again.of("search"), again.of("pack")) == (DONE, BEGUN, {})
    again.write("train", {})  # as if it had never been begun
    assert json.loads(path.read_text()) == {"format": "mpq.run/1", "stages": {"search": BEGUN}}


@pytest.mark.parametrize(
    "stages",
    [
        3,
        {"train": 3},
        {"train": {"started": 1}},
        {"train": {"started": {"fingerprint": "f"}}},
        {"train": {"kept": 1}},
        {"train": {key: value for key, value in DONE.items() if key != "outputs"}},
        *(
            {"train": DONE | spoilt}
            for spoilt in ({"seconds": "nan"}, {"seconds": [1]}, {"outputs": {"x": 3}}, {"result": []}, {"kept": [1]})
        ),
    ],
)
def test_what_mpq_run_did_not_write_is_refused(stages: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": "mpq.run/1", "stages": stages}))
    words = r"run\.json: .*: not as mpq run wrote it; delete the file, and finished stages are redone"
    with pytest.raises(MpqError, match=words):
        RunRecord(tmp_path / "run.json")


@pytest.mark.parametrize("text", ["{", '{"format": "mpq.run/2", "stages": {}}', '{"format": "mpq.run/1"}', "[]"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(MpqError, match=r"run\.json: "):
        RunRecord(tmp_path / "run.json")


def test_the_figures_of_a_stage_stand_beside_what_became_of_it() -> None:
    report = StageReport("pack", "run", "not done yet", 2.5, {"size_bytes": 10})
    assert RunResult(Path("out"), (report,), is_dry=True).to_json() == {
        "format": "mpq.run/1",
        "dry_run": True,
        "stages": [
            {"name": "pack", "action": "run", "reason": "not done yet", "seconds": 2.5, "size_bytes": 10},
        ],
    }
