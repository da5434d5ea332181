"""Allocation files: what is written is read back, and every fault names file, key, expected and got."""

import json
from pathlib import Path

import pytest

from mpq.allocation.records import Allocation
from mpq.errors import MpqError


def written(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "file.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_what_was_measured_of_an_allocation(tmp_path: Path) -> None:
    plain = Allocation({"a": 2}, 200, 150, 0.25, 2.0, ((150, 0.25),))
    measured = Allocation(
        {"a": 2}, 200, 150, 0.25, 2.0, ((150, 0.25),), measured=((140, 0.5, 0.75), (150, 0.25, 0.375)),
        measured_kl=0.375, measured_seconds=12.5,
        refinement={"moves": 2, "before": 0.5, "after": 0.25, "max_seconds": 3.5},
    )  # fmt: skip
    measured.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == measured
    raw = json.loads((tmp_path / "a.json").read_text())
    assert raw["measured"] == [[140, 0.5, 0.75], [150, 0.25, 0.375]] and raw["measured_kl"] == 0.375
    old = {key: raw[key] for key in raw if not key.startswith("measured") and key not in ("refinement", "fingerprint")}
    assert Allocation.load(written(tmp_path, old)) == plain
    for change, words in (
        ({"measured": [[140, 0.5]]}, r"measured\[0\]: expected an item more, got \[140, 0\.5\]"),
        ({"measured_kl": "low"}, 'measured_kl: expected a number, got "low"'),
        ({"measured_seconds": None}, "measured_seconds: expected a number, got null"),
        ({"refinement": []}, "refinement: expected an object"),
        ({"refinement": {"moves": 1}}, 'refinement: expected an object with "max_seconds", a number above 0, got'),
        ({"frontier": [[150, 0.25, 1]]}, r"frontier\[0\]: expected 2 items, got \[150, 0\.25, 1\]"),
        ({"target_bytes": -1}, "target_bytes: expected 0 or more, got -1"),
    ):
        with pytest.raises(MpqError, match=words):
            Allocation.load(written(tmp_path, raw | change))


def test_allocation_round_trip(tmp_path: Path) -> None:
    allocation = Allocation({"a": 2, "b": 16}, 200, 150, 0.25, 3.5, ((140, 0.5), (150, 0.25)), "exact")
    allocation.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == allocation
    raw = json.loads((tmp_path / "a.json").read_text())
    raw["layers"][0]["bits"] = 12
    with pytest.raises(MpqError, match=r"layers\[0\]\.bits: expected a whole number from 1 to 8, or 16 or 32, got 12"):
        Allocation.load(written(tmp_path, raw))
    raw["layers"] = [{"name": "a", "bits": 2}, {"name": "a", "bits": 3}]
    with pytest.raises(MpqError, match="different names"):
        Allocation.load(written(tmp_path, raw))
