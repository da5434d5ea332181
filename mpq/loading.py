"""From a path to a model, whatever wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mpq.artifact.file import is_artifact, read_artifact
from mpq.errors import MpqError
from mpq.files import check_input, digest
from mpq.identity import file_sha256
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, is_checkpoint, read_checkpoint
from mpq.models.families import foreign_files, read_foreign

PACKED_FILE = "packed.safetensors"
"""The artifact in a folder of `mpq finetune` or `mpq run`."""
RUN_FILE = "run.json"
"""The record in a folder of `mpq run`."""


@dataclass(frozen=True)
class OpenedModel:
    """A model and where it was read from.

    Attributes:
        path: The file, or the folder of another framework.
        model: The model, in eval mode.
        sha256: The fingerprint of its files (`model_sha256`).
    """

    path: Path
    model: AsrModel
    sha256: str

    def to_json(self) -> dict[str, str]:
        """Returns the "model" object of the JSON files that mpq writes."""
        return {"path": str(self.path), "sha256": self.sha256, "architecture": self.model.architecture}


def model_file(path: Path | str) -> Path:
    """Returns where a model is: the path itself if it is a file or another framework's folder, else the model in it.

    Raises:
        MpqError: No such file, or a folder without a model.
    """
    path = Path(path)
    if not path.exists():
        raise MpqError(f"{path}: no such file")
    check_input(path)
    if not path.is_dir() or foreign_files(path):
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


def model_files(path: Path | str) -> tuple[Path, ...]:
    """Returns the files of a model: one, or those of another framework's folder.

    Raises:
        MpqError: As `model_file`.
    """
    path = model_file(path)
    return foreign_files(path) or (path,)


def model_sha256(path: Path | str) -> str:
    """Returns the fingerprint of a model: the SHA-256 of its file; a digest of all of them if there are several.

    Raises:
        MpqError: As `model_file`, or a file that cannot be read.
    """
    digests = [file_sha256(file) for file in model_files(path)]
    return digests[0] if len(digests) == 1 else digest(digests)


def load_model(path: Path | str, device: str | torch.device = "cpu") -> AsrModel:
    """Returns the model in a checkpoint or artifact, in eval mode.

    Args:
        path: A file or folder of a framework that mpq reads (`mpq.models.families`), such as a NeMo archive (`.nemo`);
            a checkpoint of `mpq train` (its folder or file); a file that `mpq pack` wrote; or a folder of `mpq
            finetune`, whose artifact is read.
        device: The device to put it on.

    Raises:
        MpqError: No such file, not a format that mpq reads, or not a whole file of it.
    """
    path = model_file(path)
    if not foreign_files(path):
        if is_checkpoint(path):
            return read_checkpoint(path).to(device)
        if is_artifact(path):
            return read_artifact(path).to(device)
    return read_foreign(path).to(device)


def open_model(path: Path | str, device: str | torch.device = "cpu") -> OpenedModel:
    """Returns the model in a checkpoint or artifact together with its file and the digest of that.

    Args:
        path, device: The arguments of `load_model`.

    Raises:
        MpqError: A file that `load_model` refuses.
    """
    path = model_file(path)
    return OpenedModel(path, load_model(path, device), model_sha256(path))


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
