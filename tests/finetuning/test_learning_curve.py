"""The learning curve: what is plotted, as matplotlib has it, and what happens without matplotlib."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.finetuning.learning_curve import draw_learning_curve
from mpq.training.record import EpochResult


def epochs(*figures: tuple[float, float | None]) -> list[EpochResult]:
    """Returns epochs of ten updates each, the start first."""
    return [EpochResult(i, 10 * i, 1.0 if i else None, loss, wer, 2.0) for i, (loss, wer) in enumerate(figures)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[Axes]]:
    """What will have the axes of each figure that is saved."""
    found: list[list[Axes]] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **options: Any) -> None:
        found.append(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def points(axes: Axes) -> list[tuple[float, float]]:
    (line,) = axes.lines
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_divergence_and_word_errors_over_the_updates(drawn: list[list[Axes]], tmp_path: Path) -> None:
    for name in ("curve.svg", "again.svg"):
        draw_learning_curve(tmp_path / name, epochs((0.3, 0.25), (0.2, 0.1), (0.25, 0.15)), quiet=False)
    left, right = drawn[0]
    assert points(left) == [(0, 0.3), (10, 0.2), (20, 0.25)] and points(right) == [(0, 25), (10, 10), (20, 15)]
    assert left.get_xlabel() == "updates" and "nats" in left.get_ylabel() and right.get_ylabel().startswith("WER %")
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0
    data = (tmp_path / "curve.svg").read_bytes()
    assert ElementTree.fromstring(data).tag.endswith("svg")
    assert data == (tmp_path / "again.svg").read_bytes()  # of the figures alone: no time, nothing at random


def test_without_transcripts_there_is_the_divergence_alone(drawn: list[list[Axes]], tmp_path: Path) -> None:
    draw_learning_curve(tmp_path / "curve.svg", epochs((0.3, None), (0.2, None)), quiet=True)
    (left,) = drawn[0]
    assert points(left) == [(0, 0.3), (10, 0.2)]
