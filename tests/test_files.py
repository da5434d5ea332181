"""Files are whole or not there, and JSON is of the format that is expected."""

import hashlib
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.files import atomic_path, read_json, sha256_file, write_json


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
