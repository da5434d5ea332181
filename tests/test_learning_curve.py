"""The learning curve: what is plotted, with a stand-in for matplotlib (which is no dependency), and without it."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mpq.learning_curve import draw_learning_curve
from mpq.training_record import EpochResult


def epochs(*figures: tuple[float, float | None]) -> list[EpochResult]:
    """Returns epochs of ten updates each, the start first."""
    return [EpochResult(i, 10 * i, 1.0 if i else None, loss, wer, 2.0) for i, (loss, wer) in enumerate(figures)]


class Axes:
    """Keeps what is drawn."""

    def __init__(self) -> None:
        self.lines: list[tuple[list[float], list[float]]] = []
        self.labels: list[str] = []
        self.twin: Axes | None = None

    def plot(self, x: list[float], y: list[float], *_: Any, **__: Any) -> None:
        self.lines.append((x, y))

    def set_xlabel(self, text: str) -> None:
        self.labels.append(text)

    def set_ylabel(self, text: str, **_: Any) -> None:
        self.labels.append(text)

    def set_ylim(self, bottom: float) -> None:
        assert bottom == 0

    def twinx(self) -> "Axes":
        self.twin = Axes()
        return self.twin


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """What will have the axes of each figure that the stand-in saves."""
    found: list[Axes] = []

    class Figure:
        def __init__(self, **_: Any) -> None:
            self.axes = Axes()

        def subplots(self) -> Axes:
            return self.axes

        def savefig(self, path: Path, format: str, metadata: dict[str, Any]) -> None:
            assert format == "svg" and metadata == {"Date": None}  # the same figure has the same bytes
            path.write_text("figure")
            found.append(self.axes)

    package, module = ModuleType("matplotlib"), ModuleType("matplotlib.figure")
    package.rc_context = lambda _: nullcontext()
    module.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return found


def test_divergence_and_word_errors_over_the_updates(drawn: list[Axes], tmp_path: Path) -> None:
    draw_learning_curve(tmp_path / "curve.svg", epochs((0.3, 0.25), (0.2, 0.1), (0.25, 0.15)), quiet=False)
    (axes,) = drawn
    assert axes.lines == [([0, 10, 20], [0.3, 0.2, 0.25])] and axes.labels[0] == "updates" and "nats" in axes.labels[1]
    assert axes.twin is not None and axes.twin.lines == [([0, 10, 20], [25.0, 10.0, 15.0])]
    assert axes.twin.labels[0].startswith("WER %")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.svg"]


def test_without_transcripts_there_is_the_divergence_alone(drawn: list[Axes], tmp_path: Path) -> None:
    draw_learning_curve(tmp_path / "curve.svg", epochs((0.3, None), (0.2, None)), quiet=True)
    assert drawn[0].lines == [([0, 10], [0.3, 0.2])] and drawn[0].twin is None


@pytest.mark.parametrize("quiet", [False, True])
def test_without_matplotlib_it_is_said_that_there_is_none(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_learning_curve(tmp_path / "curve.svg", epochs((0.3, 0.25)), quiet)
    assert list(tmp_path.iterdir()) == []
    expected = "" if quiet else "mpq: no learning curve: matplotlib is not installed (mpq[plots])\n"
    assert capsys.readouterr().err == expected
