"""Figures as SVG files, where matplotlib is installed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpq.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(
    path: Path, what: str, size: tuple[float, float], draw: Callable[["Figure"], None], quiet: bool
) -> None:
    """Writes a figure; the same one gives the same bytes.

    Without matplotlib nothing is written, which is said on stderr unless `quiet`.

    Args:
        path: The file.
        what: It shows, for that message.
        size: Width and height, inches.
        draw: Draws it.
        quiet: Say nothing.
    """
    try:
        import matplotlib
    except ImportError:
        if not quiet:
            print(f"mpq: no {what}: matplotlib is not installed (mpq[plots])", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "mpq"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
