"""From a path to a model, whatever wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mpq.artifact.file import is_artifact, read_artifact
from mpq.errors import MpqError
from mpq.identity import file_sha256
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, is_checkpoint, read_checkpoint
from mpq.models.families import read_foreign

PACKED_FILE = "packed.safetensors"
"""The artifact in a folder of `mpq finetune` or `mpq run`."""
RUN_FILE = "run.json"
"""The record in a folder of `mpq run`."""


@dataclass(frozen=True)
class OpenedModel:
    """A model and the file that it was read from.

    Attributes:
        path: The file.
        model: The model, in eval mode.
        sha256: The SHA-256 of the file.
    """

    path: Path
    model: AsrModel
    sha256: str

    def to_json(self) -> dict[str, str]:
        """Returns the "model" object of the JSON files that mpq writes."""
        return {"path": str(self.path), "sha256": self.sha256, "architecture": self.model.architecture}


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
        path: A file of a family that mpq reads (`mpq.models.families`) such as a NeMo archive (`.nemo`), a checkpoint
            of `mpq train` (its folder or file), a file that `mpq pack` wrote, or a folder of `mpq finetune`, whose
            artifact is read.
        device: The device to put it on.

    Raises:
        MpqError: No such file, not a format that mpq reads, or not a whole file of it.
    """
    path = model_file(path)
    if is_checkpoint(path):
        return read_checkpoint(path).to(device)
    return (read_artifact(path) if is_artifact(path) else read_foreign(path)).to(device)


def open_model(path: Path | str, device: str | torch.device = "cpu") -> OpenedModel:
    """Returns the model in a checkpoint or artifact together with its file and the digest of that.

    Args:
        path, device: The arguments of `load_model`.

    Raises:
        MpqError: A file that `load_model` refuses.
    """
    path = model_file(path)
    return OpenedModel(path, load_model(path, device), file_sha256(path))


def open_float_model(path: Path | str, device: str | torch.device, purpose: str) -> OpenedModel:
    """Returns a float model together with its file and the digest of that; one that is packed already is refused.

    Args:
        path, device: The arguments of `load_model`.
        purpose: A verb for the message: the use that the caller makes of the model, such as "measure".

    Raises:
        MpqError: A file that `load_model` refuses, or a model that is packed already.
    """
    opened = open_model(path, device)
    if opened.model.quantized_bits:
        raise MpqError(f"{opened.path}: already packed; {purpose} the float checkpoint that it was made from")
    return opened
