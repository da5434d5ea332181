"""The training that a checkpoint folder holds: the folder is checked and claimed at the start, tidied at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import read_json, write_json
from mpq.identity import Inputs, data_identity, options_of
from mpq.models.checkpoint import MODEL_FILE
from mpq.training.data import TrainingSet
from mpq.training.record import TRAINING_FORMAT, TrainingResult
from mpq.training.state import remove_candidates

STARTED_FORMAT = "mpq.started/1"


def weight_options(recipe: Recipe) -> dict[str, Any]:
    """Returns the sections of a recipe that the weights depend on, the data aside."""
    return {name: options_of(getattr(recipe, name)) for name in ("features", "tokens", "model", "augment", "train")}


def training_inputs(recipe: Recipe, data: TrainingSet, dev: TrainingSet | None) -> Inputs:
    """Returns all that the weights depend on; a newer mpq may go on with an older one's training."""
    return Inputs.of(
        format=TRAINING_FORMAT, seed=recipe.seed, data=used_data(recipe, data, dev), **weight_options(recipe)
    )


def used_data(recipe: Recipe, train: TrainingSet, dev: TrainingSet | None) -> dict[str, Any]:
    """Returns the identity of the utterances that a training uses (`mpq.identity`), as a part of its inputs."""
    return {
        "channel": recipe.data.channel,
        "train": data_identity(train.utterances),
        "dev": data_identity(dev.utterances) if dev else None,
    }


def check_folder(
    out: Path,
    inputs: Inputs,
    result: str = "training.json",
    format: str = TRAINING_FORMAT,
    models: Sequence[str] = (MODEL_FILE,),
    remedy: str = "choose another --out, or delete the folder",
) -> None:
    """Raises MpqError if a folder holds a training of other data or with other options, or files of other origin.

    Args:
        out: The folder.
        inputs: The inputs of the training that is to use the folder.
        result, format: The name of the file that a finished training leaves, and its format.
        models: The weights that the folder will have, and files that would be taken for them.
        remedy: The part of the message that says what can be done where the folder holds another training.
    """
    ours = any((out / name).exists() for name in (result, "started.json"))
    for name in (*models, "log.jsonl", "state.pt", "recipe.json", "epochs"):
        if not ours and (out / name).exists():
            raise MpqError(f"{out / name}: is in the way, and no training wrote it; choose another --out")
    for name in (result, "started.json"):
        if (out / name).exists():
            raw = read_json(out / name, format if name == result else STARTED_FORMAT)
            if (change := inputs.change(raw)) is not None:
                raise MpqError(
                    f"{out}: holds {'a finished' if name == result else 'an unfinished'} training with other "
                    f"options or data (its recipe.json has them): {change}; {remedy}"
                )


def clean_up(out: Path) -> None:
    """Removes the files that only an unfinished training needs; files of other origin stay."""
    for name in ("state.pt", "started.json"):
        (out / name).unlink(missing_ok=True)
    remove_candidates(out, but=())


def is_finished(out: Path, names: Sequence[str], rank: int) -> bool:
    """Returns whether the files of a finished training are all there.

    Args:
        out: The folder, as `check_folder` has checked it.
        names: The names of the files.
        rank: The number of this process; process 0 removes what a kill at the very end has left.
    """
    if not all((out / name).exists() for name in names):
        return False
    if rank == 0:
        clean_up(out)
    return True


def finished_training(out: Path, rank: int) -> TrainingResult | None:
    """Returns the result of the training that a folder holds, None where it is not finished.

    Args:
        out, rank: The arguments of `is_finished`.
    """
    is_whole = is_finished(out, ("training.json", MODEL_FILE), rank)
    return TrainingResult.load(out / "training.json") if is_whole else None


def claim_folder(out: Path, inputs: Inputs) -> None:
    """Puts on record the inputs of the training that a folder is going to hold."""
    write_json(out / "started.json", {"format": STARTED_FORMAT} | inputs.to_json())
