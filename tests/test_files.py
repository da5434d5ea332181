"""Files are whole or not there, and JSON is of the format that is expected."""

import hashlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq.errors import MpqError
from mpq.files import atomic_path, read_json, sha256_file, write_json
from mpq.training.state import write_state

WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: write_json(path, {"text": "x" * 5000}),
    "state": lambda path: write_state(path.parent, {"weights": torch.zeros(5000)}),
    "safetensors": lambda path: _save(path),
}


def _save(path: Path) -> None:
    with atomic_path(path) as temporary:
        save_file({"weights": torch.zeros(5000)}, temporary)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_the_system_refuses_is_said_whoever_writes(writer: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as on a full disk
    try:
        with pytest.raises(MpqError, match="cannot be written: File too large"):
            WRITERS[writer](tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_comes_back_from_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"m\xff.jsonl")
    write_json(tmp_path / "x.json", {"format": "f", "path": name})
    assert (tmp_path / "x.json").read_bytes().decode("utf-8")
    assert read_json(tmp_path / "x.json", "f")["path"] == name


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
