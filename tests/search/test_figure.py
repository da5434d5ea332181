"""The figure and the table of a search: what they say, and what happens without matplotlib."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from mpq.cli.tables import search_view
from mpq.search.figure import draw_architecture
from mpq.search.record import Architecture, SearchedModule, SearchResult
from mpq.training.record import EpochResult, TrainingResult


def module(index: int, width: int, rank: int, widths: tuple[int, ...], ranks: tuple[int, ...]) -> SearchedModule:
    name = f"encoder.layers.{index // 2}.feed_forward{index % 2 + 1}"
    shares = [tuple(1 / len(one) for _ in one) for one in (widths, ranks)]
    return SearchedModule(name, width, rank, widths, ranks, *shares)


def architecture(*shapes: tuple[int, int], ranks: tuple[int, ...] = (0,)) -> Architecture:
    modules = tuple(module(index, *shape, (4, 8, 16), ranks) for index, shape in enumerate(shapes))
    return Architecture("f", modules, 1.25, 2.5, 1.3, 0.4, 0.2, 0.5, 0.3, (), 7.0)


WIDTHS = architecture((4, 0), (16, 0), (8, 0), (4, 0))
BOTH = architecture((4, 2), (16, 3), (8, 3), (4, 2), ranks=(2, 3))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[Axes]]:
    """What will have the axes of each figure that is saved."""
    found: list[list[Axes]] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: object, **options: object) -> None:
        found.append(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def bars(axes: Axes) -> list[list[float]]:
    return [[bar.get_height() for bar in container] for container in axes.containers]


def test_bars_are_what_was_chosen_among_the_candidates(drawn: list[list[Axes]], tmp_path: Path) -> None:
    for name in ("one.svg", "again.svg"):
        draw_architecture(tmp_path / name, BOTH, quiet=False)
    widths, ranks = drawn[0]
    assert bars(widths) == [[4, 8], [16, 4]] and bars(ranks) == [[2, 3], [3, 2]]
    assert (widths.get_ylabel(), ranks.get_ylabel(), ranks.get_xlabel()) == ("hidden units", "rank", "encoder block")
    assert [text.get_text() for text in widths.get_legend().get_texts()] == ["first module", "second module"]
    assert widths.get_title() == "1.250 of 2.500 M parameters"
    assert {tuple(line.get_ydata()) for line in widths.lines} == {(4, 8, 16)}
    assert {tuple(line.get_ydata()) for line in ranks.lines} == {(2, 3)}
    assert len(widths.lines) == len(ranks.lines) == 4
    data = (tmp_path / "one.svg").read_bytes()
    assert ElementTree.fromstring(data).tag.endswith("svg")
    assert data == (tmp_path / "again.svg").read_bytes()


def test_what_was_not_searched_is_not_drawn(drawn: list[list[Axes]], tmp_path: Path) -> None:
    fixed = replace(WIDTHS, modules=tuple(module(index, 8, 0, (8,), (0,)) for index in range(2)))
    ranks = replace(WIDTHS, modules=tuple(module(index, 8, 3, (8,), (2, 3)) for index in range(2)))
    factored = replace(WIDTHS, modules=tuple(module(index, 8, 3, (4, 8), (3,)) for index in range(2)))
    for one, labels in (
        (WIDTHS, ["hidden units"]),
        (fixed, ["hidden units"]),
        (ranks, ["rank"]),
        (factored, ["hidden units", "rank"]),
    ):
        draw_architecture(tmp_path / "a.svg", one, quiet=True)
        assert [axes.get_ylabel() for axes in drawn[-1]] == labels


def shown(found: Architecture, **changes: object) -> str:
    epochs = (EpochResult(1, 10, 0.5, 0.3, 0.1, 2.0),)
    training = TrainingResult("f", epochs, (1,), 0.35, 0.125, {"total": 1}, 3, 0.1, 0, 0, 9.0, "cpu", 1)
    result = SearchResult(None, "widths", "gumbel", 0.5, None, "runs/supernet", 60.0, found, training)
    console = Console(width=400, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(search_view(replace(result, **changes)))
    return capture.get()


def row(text: str, name: str) -> list[str]:
    lines = [re.split("[│┃]", line.strip("│┃")) for line in text.splitlines() if line[0] in "│┃"]
    (cells,) = [cells for cells in lines if cells[0].strip() == name]
    return [cell.strip() for cell in cells[1:]]


def test_the_table_of_a_search() -> None:
    text = shown(BOTH)
    assert text.splitlines()[0] == "1.250 M parameters of 2.500 M (gumbel, eta 0.5)"
    assert row(text, "block") == ["FW", "FW-m", "BN", "BN-m"]
    assert row(text, "1") == ["4", "16", "2", "3"] and row(text, "2") == ["8", "4", "3", "2"]
    assert "expected parameters 1.300 M" in text
    assert "the largest loss 0.4, WER 20.00 %; this one loss 0.5, WER 30.00 %; " in text
    assert "trained on loss 0.35, WER 12.50 % (development data)" in text
    assert "supernet 60 s (runs/supernet), choice 7 s, training 9 s, 1 epochs" in text


def test_the_table_without_ranks_transcripts_or_development_data() -> None:
    untold = replace(WIDTHS, wer=None, largest_wer=None)
    training = TrainingResult("f", (), (), None, None, {"total": 1}, 3, 0.1, 0, 0, 9.0, "cpu", 1)
    text = shown(untold, training=training, eta=None, target_millions=1.3, method="softmax")
    assert "(softmax, at most 1.3 M parameters)" in text
    assert "BN" not in text and "WER" not in text and "trained on" not in text and "development data" not in text
    assert "the largest loss 0.4; this one loss 0.5\n" in text
    mixed = replace(BOTH, modules=(*BOTH.modules[:3], module(3, 4, 0, (4,), (0,))))
    assert row(shown(mixed), "1")[2:] == ["2", "3"] and row(shown(mixed), "2")[3] == "0"
