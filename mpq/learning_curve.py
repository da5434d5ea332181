"""The learning curve of a fine-tuning as a figure."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mpq.files import atomic_path
from mpq.training_record import EpochResult


def draw_learning_curve(path: Path, epochs: Sequence[EpochResult], quiet: bool) -> None:
    """Writes an SVG figure: divergence and WER on held-out data over the updates.

    Without matplotlib nothing is written, which is said on stderr unless `quiet`.

    Args:
        path: The file.
        epochs: The start first.
        quiet: Say nothing.
    """
    try:
        import matplotlib
    except ImportError:
        if not quiet:
            print("mpq: no learning curve: matplotlib is not installed (mpq[plots])", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    steps = [one.step for one in epochs]
    with matplotlib.rc_context({"svg.hashsalt": "mpq"}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        left = figure.subplots()
        left.plot(steps, [one.dev_loss for one in epochs], "o-", color="C0")
        left.set_xlabel("updates")
        left.set_ylabel("divergence from the float model, nats", color="C0")
        left.set_ylim(bottom=0)
        if all(one.dev_wer is not None for one in epochs):
            right = left.twinx()
            right.plot(steps, [100 * one.dev_wer for one in epochs], "s--", color="C1")
            right.set_ylabel("WER %, development data", color="C1")
            right.set_ylim(bottom=0)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
