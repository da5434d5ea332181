"""Whose training a checkpoint folder holds: claimed at the start, checked before any other, tidied at the end."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import digest, read_json, write_json
from mpq.models.checkpoint import MODEL_FILE
from mpq.training.data import TrainingSet
from mpq.training.record import TRAINING_FORMAT, TrainingResult

STARTED_FORMAT = "mpq.started/1"
NEUTRAL = ("save_minutes", "workers", "tensorboard")
"""Options of the training that change no weight."""


def weight_options(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns the sections of a recipe that the weights depend on, the data aside."""
    sections = {name: getattr(recipe, name).model_dump() for name in ("features", "tokens", "model", "augment")}
    if not any(sections["augment"]["level_db"]):
        del sections["augment"]["level_db"]  # trainings from before this option go on
    return sections | {"train": recipe.train.model_dump(exclude=set(NEUTRAL))}


def training_fingerprint(recipe: Recipe, data: TrainingSet, dev: TrainingSet | None) -> str:
    """Returns a digest of all that the weights depend on; a newer mpq may go on with an older one's training."""
    work = [TRAINING_FORMAT, recipe.seed, recipe.data.channel, weight_options(recipe), data_identity(data, dev)]
    return digest(work)


def data_identity(*sets: TrainingSet | None) -> list[tuple[Any, ...]]:
    """Returns what tells the utterances of some sets from others."""
    return [
        (item.utt_id, item.text, item.offset, seconds, item.audio_path.stat().st_size)
        for part in sets
        if part
        for item, seconds in zip(part.utterances, part.durations, strict=True)
    ]


def check_folder(
    out: Path,
    fingerprint: str,
    result: str = "training.json",
    format: str = TRAINING_FORMAT,
    models: Sequence[str] = (MODEL_FILE,),
    remedy: str = "choose another --out, or delete the folder",
) -> None:
    """Raises MpqError if a folder holds a training of other data or with other options, or something else.

    Args:
        out: The folder.
        fingerprint: Of the training that is to use it.
        result, format: The file that a finished training leaves, and its format.
        models: Files that the folder will have, or that would be taken for them: the weights above all.
        remedy: What can be done where it holds another one.
    """
    ours = any((out / name).exists() for name in (result, "started.json"))
    for name in (*models, "log.jsonl", "state.pt", "recipe.json"):
        if not ours and (out / name).exists():
            raise MpqError(f"{out / name}: is in the way, and not of a training; choose another --out")
    for name in (result, "started.json"):
        if (out / name).exists():
            raw = read_json(out / name, format if name == result else STARTED_FORMAT)
            if raw.get("fingerprint") != fingerprint:
                raise MpqError(
                    f"{out}: holds {'a finished' if name == result else 'an unfinished'} training with other "
                    f"options or data (its recipe.json has them); {remedy}"
                )


def clean_up(out: Path) -> None:
    """Removes what only an unfinished training needs."""
    for name in ("state.pt", "started.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "epochs", ignore_errors=True)


def finished_training(out: Path, rank: int) -> TrainingResult | None:
    """Returns the result of the training that a folder holds, None where it is not finished.

    Args:
        out: The folder, as `check_folder` has checked it.
        rank: Of this process; the first one removes what a kill at the very end has left.
    """
    if not ((out / "training.json").exists() and (out / MODEL_FILE).exists()):
        return None
    if rank == 0:
        clean_up(out)
    return TrainingResult.load(out / "training.json")


def claim_folder(out: Path, fingerprint: str) -> None:
    """Writes down whose training a folder is about to hold."""
    write_json(out / "started.json", {"format": STARTED_FORMAT, "fingerprint": fingerprint})
