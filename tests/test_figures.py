"""Figures: the same bytes each time, and a message where matplotlib is not installed."""

import logging
import sys
from pathlib import Path

import pytest

from mpq.figures import write_figure


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        write_figure(tmp_path / name, "line", (3, 2), lambda figure: figure.subplots().plot([1, 3]), quiet=True)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


@pytest.mark.parametrize("quiet", [False, True])
def test_without_matplotlib_it_is_said_that_there_is_none(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    caplog.set_level(logging.INFO, "mpq")
    write_figure(tmp_path / "a.svg", "learning curve", (3, 2), lambda figure: None, quiet)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == ([] if quiet else ["no learning curve: matplotlib is not installed (mpq[plots])"])
