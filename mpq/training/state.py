"""The files of an unfinished training: `state.pt`, and the weights of the epochs that may be averaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpq.errors import MpqError
from mpq.files import atomic_path

STATE_FILE = "state.pt"


def write_state(out: Path, state: dict[str, Any]) -> None:
    """Writes the state, of tensors, numbers and text; a kill leaves the one before.

    Args:
        out: The folder.
        state: A dictionary with at least "batch", the place of the next batch in its epoch, and "processes", the number
            of processes that share the batches.
    """
    with atomic_path(out / STATE_FILE) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # given a path, it would not say why it cannot write


def read_state(out: Path, device: torch.device, processes: int) -> dict[str, Any] | None:
    """Returns the last saved state; None where there is none.

    Args:
        out: The folder.
        device: The device for its tensors.
        processes: The number of processes that share the batches now.

    Raises:
        MpqError: A file that cannot be read, or an epoch under way that another number of processes shared.
    """
    path = out / STATE_FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # whatever torch finds wrong with the file
        raise MpqError(f"{path}: cannot be read ({error}); delete the folder to begin anew") from None
    if state["batch"] and state["processes"] != processes:
        raise MpqError(
            f"{out}: was cut off inside an epoch that {state['processes']} processes share; go on with as many, not "
            f"with {processes}, until its end"
        )
    return state


def candidate_path(out: Path, epoch: int) -> Path:
    """Returns the path of an epoch's weights."""
    return out / "epochs" / f"{epoch:04}.safetensors"


def remove_candidates(out: Path, but: Sequence[int]) -> None:
    """Removes the weights of all epochs but some, and their folder where that leaves it empty."""
    folder = out / "epochs"
    for path in folder.glob("*.safetensors*"):
        epoch, _, ending = path.name.partition(".")
        is_whole = ending == "safetensors"  # a kill may have left another
        if epoch.isdecimal() and not (is_whole and int(epoch) in but):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
