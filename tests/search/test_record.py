"""The records of a search are the same after they were written and read."""

import json
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.search.record import Architecture, SearchedModule
from mpq.training.record import EpochResult

MODULES = tuple(
    SearchedModule(f"block.{index}", width, rank, (4, 8), (2, 3), (0.25, 0.75), (0.5, 0.5))
    for index, (width, rank) in enumerate([(4, 2), (8, 3), (8, 2), (4, 3)])
)
FOUND = Architecture(
    "f", MODULES, 1.25, 2.5, 1.3, 0.4, 0.2, 0.5, None, (EpochResult(1, 10, 0.5, None, None, 2.0),), 7.0
)


def test_an_architecture_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "architecture.json").write_text(json.dumps(FOUND.to_json()))
    assert Architecture.load(tmp_path / "architecture.json") == FOUND


def test_shapes_are_pairs_by_block() -> None:
    assert FOUND.shapes() == [((4, 2), (8, 3)), ((8, 2), (4, 3))]


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "architecture.json").write_text(json.dumps(FOUND.to_json() | {"format": "mpq.architecture/99"}))
    with pytest.raises(MpqError, match="architecture"):
        Architecture.load(tmp_path / "architecture.json")
