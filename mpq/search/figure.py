"""The widths and ranks that a search chose, block by block, as a figure."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpq.figures import write_figure
from mpq.search.record import Architecture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_architecture(path: Path, architecture: Architecture, quiet: bool) -> None:
    """Writes a figure: the width (and rank) of each block's first and second module, among the candidates.

    Args:
        path: The file to write.
        architecture: The architecture.
        quiet: Log no message.
    """
    pairs = architecture.modules[::2], architecture.modules[1::2]
    shown = [
        (label, kind, candidates)
        for label, kind, candidates in (("hidden units", "width", "widths"), ("rank", "rank", "ranks"))
        if any(len(getattr(one, candidates)) > 1 or (kind == "rank" and one.rank) for one in architecture.modules)
    ] or [("hidden units", "width", "widths")]
    blocks = range(1, len(pairs[0]) + 1)

    def draw(figure: "Figure") -> None:
        for axes, (label, kind, candidates) in zip(
            figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True
        ):
            for side, (name, modules) in enumerate(zip(("first module", "second module"), pairs, strict=True)):
                places = [block + 0.4 * side - 0.2 for block in blocks]
                axes.bar(places, [getattr(one, kind) for one in modules], 0.38, label=name, color=f"C{side}")
                for place, one in zip(places, modules, strict=True):
                    sizes = getattr(one, candidates)
                    axes.plot([place] * len(sizes), sizes, "_", color="black", markersize=7, alpha=0.35)
            axes.set_ylabel(label)
            axes.set_xticks(list(blocks))
        axes.set_xlabel("encoder block")
        figure.axes[0].set_title(
            f"{architecture.millions:.3f} of {architecture.largest_millions:.3f} M parameters", fontsize=10
        )
        figure.axes[0].legend(fontsize=8, ncols=2)

    write_figure(path, "figure of the architecture", (6.5, 2.6 * len(shown) + 0.4), draw, quiet)
