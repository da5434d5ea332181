"""A comparison as JSON: the keys that others rely on, and the same bytes for the same result."""

import json
from dataclasses import replace
from pathlib import Path

from mpq.scoring.records import Comparison, Comparisons, Group, Groups, MapssweResult, NonInferiority, SystemScore

SCORE = SystemScore("float", 0.25, 6, 1, 1, 0, 2)


def test_keys_are_those_of_the_format(tmp_path: Path) -> None:
    mapsswe = MapssweResult(3, 0.5, 1.0, 0.87, 0.38, 0.39, False, None)
    shown = NonInferiority(0.002, None, False)
    comparison = Comparison(0.05, 4, 8, SCORE, SCORE, mapsswe, {"p": 1.0}, {"low": 0.0}, (), True, shown, 0.25)
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
    assert written["non_inferiority"] == {"margin": 0.002, "upper": None, "non_inferior": False}
    assert written["detectable"] == 0.25 and written["by"] is None
    group = Group("s1", 2, 4, 0.25, 0.5, 3, None, None, True, None, False)
    together = Comparisons(
        (replace(comparison, by=Groups("speaker", None, (group,))), comparison), (0.76, 0.76), True, False
    )
    together.save(tmp_path / "all.json")
    written = json.loads((tmp_path / "all.json").read_text())
    assert set(written) == {"format", "alpha", "lossless", "non_inferior", "p", "sets"}
    assert written["format"] == "mpq.comparisons/1" and written["alpha"] == 0.05 and written["p"] == [0.76, 0.76]
    assert written["sets"][1] == json.loads((tmp_path / "c.json").read_text())
    assert written["sets"][0]["by"] == {
        "key": "speaker", "worst": None,
        "groups": [{"name": "s1", "utterances": 2, "words": 4, "wer_a": 0.25, "wer_b": 0.5, "segments": 3,
                    "upper": None, "detectable": None, "too_small": True, "p": None, "worse": False}],
    }  # fmt: skip
