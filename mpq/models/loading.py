"""From a path to a model, whatever wrote it."""

from pathlib import Path

import torch

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, is_checkpoint, read_checkpoint
from mpq.models.nemo import read_nemo


def model_file(path: Path | str) -> Path:
    """Returns the file of a checkpoint: the path itself, or the model in a checkpoint folder.

    Raises:
        MpqError: No such file, or a folder without a model.
    """
    path = Path(path)
    if not path.exists():
        raise MpqError(f"{path}: no such file")
    if not path.is_dir():
        return path
    if not (path / MODEL_FILE).exists():
        raise MpqError(
            f"{path}: a folder without {MODEL_FILE}; expected a checkpoint folder of `mpq train` (a finished one), "
            "a .nemo archive or a file that `mpq pack` wrote"
        )
    return path / MODEL_FILE


def load_model(path: Path | str, device: str | torch.device = "cpu") -> AsrModel:
    """Returns the model in a checkpoint or artifact, in eval mode.

    Args:
        path: A NeMo archive (`.nemo`), a checkpoint of `mpq train` (its folder or file), or a file that `mpq pack`
            wrote.
        device: Where to put it.

    Raises:
        MpqError: No such file, not a format that mpq reads, or not a whole file of it.
    """
    from mpq.artifact import is_artifact, read_artifact  # which needs this package's models

    path = model_file(path)
    if is_checkpoint(path):
        return read_checkpoint(path).to(device)
    return (read_artifact(path) if is_artifact(path) else read_nemo(path)).to(device)
