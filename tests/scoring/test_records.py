"""A comparison as JSON: the keys that others rely on, and the same bytes for the same result."""

import json
from pathlib import Path

from mpq.scoring.records import Comparison, MapssweResult, SystemScore

SCORE = SystemScore("float", 0.25, 6, 1, 1, 0, 2)


def test_keys_are_those_of_the_format(tmp_path: Path) -> None:
    mapsswe = MapssweResult(3, 0.5, 1.0, 0.87, 0.38, 0.39, False, None)
    comparison = Comparison(0.05, 4, 8, SCORE, SCORE, mapsswe, {"p": 1.0}, {"low": 0.0}, (), True)
    comparison.save(tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["format"] == "mpq.comparison/1" and written["lossless"] is True and written["changed"] == []
    assert written["a"] == {
        "name": "float", "wer": 0.25, "corr": 6, "sub": 1, "del": 1, "ins": 0, "sentence_errors": 2,
    }  # fmt: skip
    assert set(written["mapsswe"]) == {
        "segments", "mean", "std", "z", "p", "p_sctk", "significant", "better", "note",
    }  # fmt: skip
    comparison.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "c.json").read_bytes()
