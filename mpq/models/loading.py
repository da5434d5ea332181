"""From a path to a model, whatever wrote it."""

from pathlib import Path

import torch

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.nemo import read_nemo


def load_model(path: Path | str, device: str | torch.device = "cpu") -> AsrModel:
    """Returns the model in a checkpoint or artifact, in eval mode.

    Args:
        path: A NeMo archive (`.nemo`), or a file that `mpq pack` wrote.
        device: Where to put it.

    Raises:
        MpqError: No such file, not a format that mpq reads, or not a whole file of it.
    """
    from mpq.artifact import is_artifact, read_artifact  # which needs this package's models

    path = Path(path)
    if not path.exists():
        raise MpqError(f"{path}: no such file")
    if path.is_dir():
        raise MpqError(f"{path}: a folder; expected a .nemo archive or a file that `mpq pack` wrote")
    return (read_artifact(path) if is_artifact(path) else read_nemo(path)).to(device)
