"""Files that others write: every fault names file, key, expected and got."""

import copy
import hashlib
import json
from pathlib import Path

import pytest

from mpq.allocation.records import Allocation
from mpq.errors import MpqError
from mpq.files import atomic_path, read_json, sha256_file, write_json
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
        (changed("layers.0.name", "\ud800"), r"layers\[0\]\.name: expected a string"),
        (changed("layers.0.bytes.2", 10**30), r"layers\[0\]\.bytes\.2: expected a whole number"),
        (changed("layers.0.kl.2", 9e307), r"layers\[0\]\.kl\.2: expected a finite number"),
        (changed("bits", [2, 9]), r"bits\[1\]: expected a whole number from 1 to 8, got 9"),
        (changed("fixed_bytes", -1), "fixed_bytes: expected a whole number, 0 or more"),
        (changed("fixed_bytes", 1.5), "fixed_bytes: expected a whole number"),
        (changed("layers", []), "layers: expected at least one layer"),
        (changed("layers.0.name", 3), r"layers\[0\]\.name: expected a string .*, got 3"),
        (changed("layers.1.name", "a"), "layers: expected different names"),
        (changed("layers.1.kl.4", float("nan")), r"layers\[1\]\.kl\.4: expected a finite number"),
        (changed("layers.1.kl.4", "0.1"), r"layers\[1\]\.kl\.4: expected a finite number"),
        (changed("layers.1.kl", {"2": 0.5}), r"layers\[1\]\.kl\.4: this key is missing"),
        (changed("layers.0.bytes.2", True), r"layers\[0\]\.bytes\.2: expected a whole number"),
        (changed("layers.0.numel", 15), r"layers\[0\]\.numel: expected the product of shape, 16, got 15"),
        (changed("layers.0.group", 1), r"layers\[0\]\.group: expected a string .*, got 1"),
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
        ({"2": [0.4], "4": [0, 1]}, r"layers\[0\]\.interval\.2: expected a pair \[low, high\], got \[0\.4\]"),
        ({"2": [0, 1], "4": [0, "1"]}, r"layers\[0\]\.interval\.4: expected a finite number"),
        ([[0, 1], [0, 1]], r"layers\[0\]\.interval: expected an object"),
    ):
        with pytest.raises(MpqError, match=words):
            SensitivityTable.load(written(tmp_path, changed("layers.0.interval", value)))


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
        ({"measured": [[140, 0.5]]}, r"measured\[0\]: expected \[bytes, predicted kl, measured kl\]"),
        ({"measured_kl": "low"}, "measured_kl: expected a finite number"),
        ({"measured_seconds": None}, "measured_seconds: expected a finite number"),
        ({"refinement": []}, "refinement: expected an object"),
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


def test_atomic_writing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"format": "f", "n": 1})
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(ValueError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert read_json(path, "f") == {"format": "f", "n": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(MpqError, match="does not exist"):
        write_json(tmp_path / "no" / "x.json", {})
    with pytest.raises(ValueError):
        write_json(path, {"n": float("nan")})
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for missing in (sha256_file, lambda name: read_json(name, "f")):
        with pytest.raises(MpqError, match="no such file"):
            missing(tmp_path / "absent")
