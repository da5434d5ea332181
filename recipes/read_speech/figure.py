"""The picture of the main README: word error rate against file size, before and after fine-tuning.

    python recipes/read_speech/figure.py [--out docs]

The numbers are those of the table of fine-tuning in README.md beside this file (`finetune.py` printed it): the test
part of the read speech. Two files are written, wer_by_size_light.svg and wer_by_size_dark.svg.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpq.errors import MpqError
from mpq.figures import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("README.md")
SERIES = {
    "all layers at one width, rounded to nearest": r"uniform [\d.]+, nearest",
    "mpq: a width for each layer, rounded by the data": r"mixed [\d.]+",
    "mpq, fine-tuned": r"mixed (4|2\.5|2), fine-tuned|mixed 3, fine-tuned slowly",
}
"""{name in the legend: the rows of the table}"""
COLOURS = {"light": ("#1f2328", "#9a6700", "#0969da", "#1a7f37"), "dark": ("#e6edf3", "#d29922", "#58a6ff", "#3fb950")}
"""{background: (text and axes, a colour for each of SERIES)}"""


@dataclass(frozen=True)
class Point:
    """A model of the table.

    Attributes:
        name: The table's name of it.
        megabytes: The size of its file, MB of 2^20 bytes.
        wer: Its word error rate on test, %.
        is_worse: Whether it is significantly worse than float32 there.
    """

    name: str
    megabytes: float
    wer: float
    is_worse: bool


def points(page: str) -> Iterator[Point]:
    """Yields the models of the table of fine-tuning, float32 first."""
    head = "| model | bytes | times smaller | dev WER % (S D I) | p | test WER % (S D I) | p |"
    _, found, rest = page.partition(head)
    if not found:
        raise MpqError(f"{PAGE}: expected a table that begins with {head}; finetune.py prints it")
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            return
        name, size, _, _, _, wer, p, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        yield Point(name, int(size) / 2**20, float(wer.split()[0]), "*" in p)


def draw(figure: "Figure", models: list[Point], colours: tuple[str, ...]) -> None:
    """Draws the models into an empty figure of no background."""
    ink, *of_series = colours
    figure.set_facecolor("none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    full = models[0]
    axes.axhline(full.wer, color=ink, linestyle="--", linewidth=1)
    axes.annotate(f"float32, {full.megabytes:.1f} MB: {full.wer:.2f} %", (3.82, full.wer), (0, -13),
                  textcoords="offset points", color=ink)  # fmt: skip
    for (label, pattern), colour in zip(SERIES.items(), of_series, strict=True):
        series = [model for model in models if re.fullmatch(pattern, model.name)]
        style = "-" if len(series) > 2 else ":"  # between two far points the course is not known
        axes.plot([one.megabytes for one in series], [one.wer for one in series], style, color=colour, label=label)
        for one in series:
            axes.plot(one.megabytes, one.wer, "o", color=colour, markerfacecolor="none" if one.is_worse else colour)
    axes.plot([], [], "o", color=ink, label="not significantly worse than float32")
    axes.plot([], [], "o", color=ink, markerfacecolor="none", label="significantly worse (MAPSSWE, 5 %)")
    axes.set_yscale("log")
    axes.set_ylim(3.3, 110)
    axes.set_yticks([4, 5, 6, 8, 10, 20, 50, 100], labels=["4", "5", "6", "8", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_ylabel("word error rate, %")
    axes.set_xlabel("file size, MB")
    axes.tick_params(colors=ink)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(ink)
    for name, spine in axes.spines.items():
        spine.set(color=ink, visible=name in ("left", "bottom"))
    axes.legend(frameon=False, labelcolor=ink)


@click.command()
@click.option("--out", default="docs", type=click.Path(path_type=Path), show_default=True, help="Folder to write to.")
def main(out: Path) -> None:
    models = list(points(PAGE.read_text()))
    for background, colours in COLOURS.items():
        path = out / f"wer_by_size_{background}.svg"
        write_figure(path, "figure of word errors", (7.5, 4), lambda figure, c=colours: draw(figure, models, c), False)


if __name__ == "__main__":
    main()
