"""Faults that would come to light only after the training: `mpq run` tells all of them before anything starts."""

import json
import os

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.pipeline.setting import recipe_quantizer
from mpq.runtime import choose_device
from mpq.search.space import search_space
from mpq.speech.manifests import read_data
from mpq.training.building import encoder_options


def check_run(recipe: Recipe, device: str) -> None:
    """Raises MpqError if something stands in the way of a stage, with a line for each fault.

    Args:
        recipe: The recipe, as `load_recipe` returns it.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
    """
    choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise MpqError(
            "mpq run is one process; train with torchrun (torchrun ... -m mpq train RECIPE --out RUN/train), then "
            "`mpq run RECIPE --out RUN` takes the training as it is"
        )
    faults = _manifest_faults(recipe)
    faults += [] if faults else _transcript_faults(recipe)
    try:
        if _has_own_search(recipe):
            own = encoder_options(recipe)
            search_space(recipe.search, own.ffn_shapes(), own.width, is_trained=recipe.search.trained)
    except MpqError as error:
        faults += str(error).splitlines()
    try:
        recipe_quantizer(recipe)
    except MpqError as error:
        faults.append(f"[sensitivity] {error}")
    if faults:
        raise MpqError("\n".join(faults))


def _has_own_search(recipe: Recipe) -> bool:
    """Returns whether the model that is searched is one of this recipe."""
    return "search" in recipe.stages and recipe.checkpoint is None


def _manifest_faults(recipe: Recipe) -> list[str]:
    """Returns the faults of the manifests that the stages read."""
    data, stages, faults = recipe.data, set(recipe.stages), []
    names: list[str | None] = [*data.train, data.dev] if {"train", "search", "finetune"} & stages else []
    names += data.test.values() if {"evaluate", "compare"} & stages else []
    names += [recipe.calibration()] if "sensitivity" in stages else []
    names += [recipe.search.held_out] if "search" in stages else []
    names += [data.calibration] if "search" in stages and (recipe.search.trained or recipe.checkpoint) else []
    for name in dict.fromkeys(name for name in names if name):
        try:
            read_data(recipe.path(name), data.skip_bad)
        except MpqError as error:
            faults.append(str(error))
    return faults


def _transcript_faults(recipe: Recipe) -> list[str]:
    """Returns a fault for each option that needs transcripts which the data do not have."""
    data, search, finetune = recipe.data, recipe.search, recipe.finetune
    wanted: list[tuple[str, str, object, list[str]]] = []
    if "finetune" in recipe.stages:
        if finetune.transcript_weight:
            wanted.append(("finetune", "transcript_weight", finetune.transcript_weight, data.train))
        if finetune.select == "wer" and data.dev:
            wanted.append(("finetune", "select", finetune.select, [data.dev]))
    if _has_own_search(recipe) and search.held_out and search.loss != "distillation":
        wanted.append(("search", "held_out", search.held_out, [search.held_out]))
    return [
        f"[{section}] {key}: {json.dumps(value)} needs transcripts in {', '.join(names)}, which has none"
        for section, key, value, names in wanted
        if all(item.text is None for name in names for item in read_data(recipe.path(name), data.skip_bad))
    ]
