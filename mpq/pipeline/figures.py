"""The figures of a stage, as `run.json` and the table of `mpq run` have them."""

import os
from pathlib import Path
from typing import Any

from mpq.loading import load_model, model_file
from mpq.models.checkpoint import is_checkpoint
from mpq.scoring.evaluate import Evaluation
from mpq.search.record import SearchResult


def search_figures(result: SearchResult, file: Path, baseline: Path | None) -> dict[str, Any]:
    """Returns the figures of a search: parameters, widths (and ranks) of each block, true sizes.

    Args:
        result: The search.
        file: The model found.
        baseline: The trained model before the search; None where there is none.
    """
    architecture, done = result.architecture, result.training
    shapes, size = architecture.shapes(), os.path.getsize(file)
    figures: dict[str, Any] = {
        "dev_wer": done.dev_wer,
        "parameters": {"found": done.parameters["total"], "largest": round(1e6 * architecture.largest_millions)},
        "widths": [[width for width, _ in block] for block in shapes],
    }
    if any(rank for block in shapes for _, rank in block):
        figures["ranks"] = [[rank for _, rank in block] for block in shapes]
    figures["size_bytes"] = size
    if baseline is not None:
        figures["baseline_bytes"] = _float_bytes(model_file(baseline))
        figures["ratio"] = figures["baseline_bytes"] / size
    return figures


def _float_bytes(file: Path) -> int:
    """Returns the size of a checkpoint in float32; for an archive of another framework, that of its parameters."""
    if is_checkpoint(file):
        return os.path.getsize(file)
    return 4 * load_model(file).parameter_counts()["total"]


def evaluation_figures(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the word errors of an evaluation."""
    metrics = evaluation.metrics
    return {
        "wer": metrics.wer,
        "words": metrics.words,
        "sub": metrics.substitutions,
        "del": metrics.deletions,
        "ins": metrics.insertions,
    }
