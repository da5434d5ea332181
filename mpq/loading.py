"""From a path to a model, whatever wrote it."""

from pathlib import Path

import torch

from mpq.artifact.file import is_artifact, read_artifact
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, is_checkpoint, read_checkpoint
from mpq.models.nemo import read_nemo

PACKED_FILE = "packed.safetensors"
"""The artifact in a folder of `mpq finetune` or `mpq run`."""
RUN_FILE = "run.json"
"""In the folder of `mpq run`."""


def model_file(path: Path | str) -> Path:
    """Returns the file of a checkpoint: the path itself, or the model in a checkpoint folder or fine-tuned folder.

    Raises:
        MpqError: No such file, or a folder without a model.
    """
    path = Path(path)
    if not path.exists():
        raise MpqError(f"{path}: no such file")
    if not path.is_dir():
        return path
    if (path / MODEL_FILE).exists():
        return path / MODEL_FILE
    if (path / RUN_FILE).exists():
        raise MpqError(f"{path}: a folder of `mpq run`; name the model in it, such as {path / PACKED_FILE}")
    if (path / PACKED_FILE).exists():
        return path / PACKED_FILE
    if several := sorted(path.glob("packed-*.safetensors")):
        raise MpqError(f"{path}: a folder with several packed files; name one of them, such as {several[0]}")
    raise MpqError(
        f"{path}: a folder without {MODEL_FILE}; expected a checkpoint folder of `mpq train` or `mpq finetune` (a "
        "finished one), a .nemo archive or a file that `mpq pack` wrote"
    )


def load_model(path: Path | str, device: str | torch.device = "cpu") -> AsrModel:
    """Returns the model in a checkpoint or artifact, in eval mode.

    Args:
        path: A NeMo archive (`.nemo`), a checkpoint of `mpq train` (its folder or file), a file that `mpq pack` wrote,
            or a folder of `mpq finetune`, whose artifact is read.
        device: Where to put it.

    Raises:
        MpqError: No such file, not a format that mpq reads, or not a whole file of it.
    """
    path = model_file(path)
    if is_checkpoint(path):
        return read_checkpoint(path).to(device)
    return (read_artifact(path) if is_artifact(path) else read_nemo(path)).to(device)
