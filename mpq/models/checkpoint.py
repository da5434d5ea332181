"""The float checkpoint that mpq writes: one safetensors file with weights, configuration and tokenizer.

The configuration is JSON in the file's metadata, the tokenizer a tensor of bytes. A checkpoint folder holds it as
`model.safetensors`.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.models.base import AsrModel, is_counter, load_state
from mpq.models.families import family_class

CHECKPOINT_FORMAT = "mpq.checkpoint/1"
MODEL_FILE = "model.safetensors"
_TOKENIZER = "tokenizer"


def write_checkpoint(path: Path, model: AsrModel) -> None:
    """Writes a model's float weights, configuration and tokenizer; the file appears when it is whole.

    Raises:
        MpqError: The file cannot be written.
    """
    config, blob = model.to_config()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not is_counter(name)}
    tensors[_TOKENIZER] = torch.frombuffer(bytearray(blob or b"\0"), dtype=torch.uint8)
    record = json.dumps({"format": CHECKPOINT_FORMAT, "model": config}, ensure_ascii=False, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"mpq": record})


def is_checkpoint(path: Path) -> bool:
    """Returns whether a file is a safetensors file that `write_checkpoint` wrote, of whatever version."""
    try:
        with safe_open(path, framework="pt") as file:
            return "mpq" in (file.metadata() or {}) and "format" not in file.metadata()
    except (SafetensorError, OSError):
        return False


def checkpoint_family(path: Path) -> str | None:
    """Returns the family of the model in a checkpoint file, from its header alone; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {})["mpq"])["model"]["family"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def read_checkpoint(path: Path) -> AsrModel:
    """Returns the model in a checkpoint file, float32, eval mode, on the CPU.

    Raises:
        MpqError: Not such a file, cut off, of another version, or contradicting itself.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "mpq" not in metadata:
                raise MpqError("no metadata of mpq in it; expected a file that `mpq train` wrote")
            record = json.loads(metadata["mpq"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        if record["format"] != CHECKPOINT_FORMAT:
            raise MpqError(f'"format": expected "{CHECKPOINT_FORMAT}", got {json.dumps(record["format"])}; update mpq')
        blob = bytes(state.pop(_TOKENIZER).numpy())
        model = family_class(record["model"]["family"]).from_config(record["model"], blob)
        load_state(model, state)
    except Exception as error:  # a spoilt record may lead to any
        reason = " ".join(str(error).split())
        if not isinstance(error, SafetensorError | OSError | MpqError):
            reason = f"its configuration is spoilt ({type(error).__name__}{reason and ': '}{reason})"
        raise MpqError(f"{path}: not a whole checkpoint of mpq: {reason}") from None
    return model
