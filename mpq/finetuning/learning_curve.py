"""The learning curve of a fine-tuning as a figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpq.figures import write_figure
from mpq.training.record import EpochResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_learning_curve(path: Path, epochs: Sequence[EpochResult], quiet: bool) -> None:
    """Writes a figure (`mpq.figures`): divergence and WER on held-out data over the updates.

    Args:
        path: The file to write.
        epochs: All epochs, the starting weights first.
        quiet: Log no message.
    """
    steps = [one.step for one in epochs]

    def draw(figure: "Figure") -> None:
        left = figure.subplots()
        left.plot(steps, [math.nan if one.dev_loss is None else one.dev_loss for one in epochs], "o-", color="C0")
        left.set_xlabel("updates")
        left.set_ylabel("divergence from the float model, nats", color="C0")
        left.set_ylim(bottom=0)
        wers = [100 * one.dev_wer for one in epochs if one.dev_wer is not None]
        if len(wers) == len(steps):
            right = left.twinx()
            right.plot(steps, wers, "s--", color="C1")
            right.set_ylabel("WER %, development data", color="C1")
            right.set_ylim(bottom=0)

    write_figure(path, "learning curve", (6, 3.5), draw, quiet)
