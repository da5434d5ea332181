"""What a run replaces is moved whole, and comes back where that was for nothing."""

from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.pipeline.aside import Aside


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name in ("search/model", "search/supernet/model", "search/architecture/model", "table.json", "train/model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_moved_has_the_same_path_below_the_next_free_name(out: Path) -> None:
    before = files(out)
    (out / "replaced-1").mkdir()
    aside = Aside(out)
    aside.move([out / "search", out / "table.json", out / "gone"], [])
    assert aside.folder == out / "replaced-2" and not (out / "search").exists()
    assert files(aside.folder) == {name: text for name, text in before.items() if name != "train/model"}
    assert (out / "train/model").exists() and Aside(out).folder == out / "replaced-3"


def test_what_stays_is_not_touched(out: Path) -> None:
    staying = out / "search/supernet"
    inode = staying.stat().st_ino
    aside = Aside(out)
    aside.move([out / "search"], [staying, out / "train/none"])
    assert set(files(aside.folder)) == {"search/model", "search/architecture/model"}
    assert staying.stat().st_ino == inode and [path.name for path in (out / "search").iterdir()] == ["supernet"]


def test_what_is_put_back_is_as_it_was(out: Path) -> None:
    before = files(out)
    aside = Aside(out)
    first = aside.move([out / "table.json"], [])
    second = aside.move([out / "search"], [out / "search/supernet"])
    (out / "search/architecture").mkdir()  # as a command that was refused leaves it
    second.put_back()
    assert files(out) == {name: one for name, one in before.items() if name != "table.json"} | {
        "replaced-1/table.json": "table.json"
    }
    first.put_back()
    assert files(out) == before and not aside.folder.exists()


def test_what_cannot_be_moved_is_told(out: Path) -> None:
    aside = Aside(out)
    (aside.folder / "search").mkdir(parents=True)
    (aside.folder / "search/other").touch()
    with pytest.raises(MpqError, match=r"search: cannot be moved to .*replaced-1/search: .*; move it away yourself"):
        aside.move([out / "search"], [])
