"""Figures as SVG files, where matplotlib is installed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpq.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)


def write_figure(
    path: Path, what: str, size: tuple[float, float], draw: Callable[["Figure"], None], quiet: bool
) -> None:
    """Writes a figure; the same one gives the same bytes.

    Without matplotlib nothing is written, which a message says unless `quiet`.

    Args:
        path: The file to write.
        what: The figure's name in that message.
        size: Width and height, inches.
        draw: Draws the contents of an empty figure.
        quiet: Log no message.
    """
    try:
        import matplotlib
    except ImportError:
        if not quiet:
            _log.info("no %s: matplotlib is not installed (mpq[plots])", what)
        return
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "mpq"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
