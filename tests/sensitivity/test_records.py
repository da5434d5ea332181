"""Sensitivity files that others write: every fault names file, key, expected and got."""

import copy
import json
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable

BY_HAND = {
    "format": "mpq.sensitivity/1",
    "bits": [2, 4],
    "fixed_bytes": 100,
    "layers": [
        {"name": "a", "kind": "linear", "shape": [2, 8], "numel": 16, "group": None,
         "bytes": {"2": 6, "4": 10}, "kl": {"2": 0.5, "4": 0.1}},
        {"name": "b", "kind": "conv1d", "shape": [4, 1, 4], "numel": 16, "group": "g",
         "bytes": {"2": 6, "4": 10}, "kl": {"2": 1, "4": 0}},
    ],
}  # fmt: skip


def written(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "file.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    table = SensitivityTable.load(written(tmp_path, BY_HAND))
    assert table.bits == (2, 4) and table.fixed_bytes == 100
    assert table.layers[1] == LayerSensitivity("b", "conv1d", (4, 1, 4), 16, {2: 6, 4: 10}, {2: 1.0, 4: 0.0}, "g")
    assert SensitivityTable.load(written(tmp_path, BY_HAND | {"bits": [4, 2]})) == table
    table.save(tmp_path / "again.json")
    assert SensitivityTable.load(tmp_path / "again.json") == table


def changed(path: str, value: object) -> dict:
    result = copy.deepcopy(BY_HAND)
    *parents, last = path.split(".")
    place = result
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return result


@pytest.mark.parametrize(
    "value, words",
    [
        ("{", "line 1: not JSON"),
        ("[]", "expected a JSON object"),
        (changed("format", "mpq.sensitivity/2"), '"format": expected "mpq.sensitivity/1", got "mpq.sensitivity/2"'),
        (changed("bits", KeyError), "bits: this key is missing"),
        (changed("bits", [4, 4]), "bits: expected a non-empty list of different widths, got"),
        (changed("bits", []), "bits: expected a non-empty list"),
        ("[" * 100_000, "not JSON of a reasonable shape"),
        ('{"format": ' + "9" * 5000 + "}", "not JSON of a reasonable shape"),
        (changed("layers.0.name", "\ud800"), r"layers\[0\]\.name: expected a string of Unicode characters"),
        (changed("layers.0.bytes.2", 10**30), r"layers\[0\]\.bytes\.2: expected less than 9007199254740992, got"),
        (changed("layers.0.kl.2", 9e307), r"layers\[0\]\.kl\.2: expected less than 1e\+100, got 9e\+307"),
        (changed("bits", [2, 9]), r"bits\[1\]: expected a whole number from 1 to 8, got 9"),
        (changed("fixed_bytes", -1), "fixed_bytes: expected 0 or more, got -1"),
        (changed("fixed_bytes", 1.5), "fixed_bytes: expected a whole number"),
        (changed("layers", []), "layers: expected at least one layer"),
        (changed("layers.0.name", 3), r"layers\[0\]\.name: expected a string, got 3"),
        (changed("layers.1.name", "a"), "layers: expected different names, not a twice"),
        (changed("layers.1.kl.4", float("nan")), r"layers\[1\]\.kl\.4: expected a finite number"),
        (changed("layers.1.kl.4", "0.1"), r"layers\[1\]\.kl\.4: expected a number, got "),
        (changed("layers.1.kl", {"2": 0.5}), r"layers\[1\]\.kl\.4: this key is missing"),
        (changed("layers.0.bytes.2", True), r"layers\[0\]\.bytes\.2: expected a whole number"),
        (changed("layers.0.numel", 15), r"layers\[0\]\.numel: expected the product of shape, 16, got 15"),
        (changed("layers.0.group", 1), r"layers\[0\]\.group: expected a string, got 1"),
    ],
)
def test_faults_are_named(tmp_path: Path, value: object, words: str) -> None:
    path = written(tmp_path, value)
    with pytest.raises(MpqError, match=words) as caught:
        SensitivityTable.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_intervals(tmp_path: Path) -> None:
    """Of all widths or none; a file without them, or with null, has none."""
    raw = changed("layers.0.interval", {"2": [0.4, 0.625], "4": [0, 0.2]})
    raw["layers"][1]["interval"] = None
    table = SensitivityTable.load(written(tmp_path, raw))
    assert table.layers[0].interval == {2: (0.4, 0.625), 4: (0.0, 0.2)} and table.layers[1].interval is None
    table.save(tmp_path / "again.json")
    assert SensitivityTable.load(tmp_path / "again.json") == table
    again = json.loads((tmp_path / "again.json").read_text())["layers"]
    assert again[0]["interval"] == {"2": [0.4, 0.625], "4": [0.0, 0.2]} and "interval" not in again[1]
    for value, words in (
        ({"2": [0.4, 0.6]}, r"layers\[0\]\.interval\.4: this key is missing"),
        ({"2": [0.4], "4": [0, 1]}, r"layers\[0\]\.interval\.2: expected an item more, got \[0\.4\]"),
        ({"2": [0, 1], "4": [0, "1"]}, r"layers\[0\]\.interval\.4\[1\]: expected a number"),
        ([[0, 1], [0, 1]], r"layers\[0\]\.interval: expected an object"),
    ):
        with pytest.raises(MpqError, match=words):
            SensitivityTable.load(written(tmp_path, changed("layers.0.interval", value)))
