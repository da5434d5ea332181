"""Faults of a recipe that no single key shows: missing files, options that contradict each other."""

import json
import os
import re
from pathlib import Path

from mpq.config import STAGES, SYNTHETIC_NOISE, ModelConfig, Recipe
from mpq.search.space import candidate_faults

ALTERNATIVES = {
    "search": ("eta", "target_millions"),
    "allocate": ("target_mb", "target_ratio", "average_bits", "max_divergence"),
}
"""Keys of which exactly one is needed: one that is given on the command line replaces those of the file."""


def missing_files(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns (keys, fault) for each file or folder that the recipe's stages read and that is not there."""
    wanted: list[tuple[str, str, str | Path]] = []
    data, stages = recipe.data, recipe.stages
    for stage, section in (("train", "augment"), ("search", "augment"), ("finetune", "finetune_augment")):
        if stage in stages:
            wanted += [("data.train", f"[data] train[{i}]", recipe.path(name)) for i, name in enumerate(data.train)]
            wanted += [("data.dev", "[data] dev", recipe.path(data.dev))] if data.dev else []
            noise = [one for one in getattr(recipe, section).noise if one not in SYNTHETIC_NOISE]
            wanted += [(f"{section}.noise", f"[{section}] noise", one) for one in noise]
    if "search" in stages and recipe.search.held_out:
        held_out = recipe.search.held_out
        wanted += [("search.held_out", "[search] held_out", recipe.path(held_out))]
    if "train" not in stages and stages and recipe.checkpoint:
        wanted += [("checkpoint", "checkpoint", recipe.checkpoint)]
    if {"evaluate", "compare"} & set(stages):
        wanted += [("data.test", f"[data] test.{key}", recipe.path(name)) for key, name in data.test.items()]
    has_statistics = "search" in stages and (recipe.search.trained or recipe.checkpoint)
    if ("sensitivity" in stages or has_statistics) and data.calibration:
        wanted += [("data.calibration", "[data] calibration", recipe.path(data.calibration))]
    elif "sensitivity" in stages and "train" not in stages and data.train:
        wanted += [("data.train", "[data] train[0]", recipe.path(data.train[0]))]
    return [
        (
            f"stages data.root {key}" if key != "checkpoint" else f"stages {key}",
            f"{name}: {path}: no such file or folder",
        )
        for key, name, path in wanted
        if not os.path.exists(path)
    ]


def contradictions(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns (keys that it is about, fault) for each fault that no single key shows."""
    faults: list[tuple[str, str]] = []
    stages = list(recipe.stages)
    if stages != [stage for stage in STAGES if stage in stages]:
        faults.append(("stages", f"stages: expected each at most once and in the order {', '.join(STAGES)}"))
    for section, loop in (("train", recipe.train), ("finetune", recipe.finetune)):
        if loop.patience and loop.select == "last":
            text = (
                'the last epoch always counts as best with select = "last", so training would never stop; leave one out'
            )
            faults.append((f"{section}.patience {section}.select", f"[{section}] patience: {text}"))
    faults += _training_faults(recipe)
    if "search" in stages:
        faults += _search_faults(recipe)
    if "train" in stages or recipe.checkpoint is None:
        faults += _model_faults(recipe)
    if (recipe.tokens.type == "bpe") != (recipe.tokens.vocabulary_size is not None):
        text = '[tokens] vocabulary_size: expected with type = "bpe", and only there'
        faults.append(("tokens.type tokens.vocabulary_size", text))
    faults += _augmentation_faults(recipe) + _finetuning_faults(recipe) + _budget_faults(recipe)
    for stage, needs in _NEEDS:
        if stage in stages and needs not in stages:
            faults.append(("stages", f"stages: {stage} needs {needs} before it"))
    return faults + _data_faults(recipe)


def _training_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the faults of the stage train, or of a recipe without it."""
    faults: list[tuple[str, str]] = []
    stages, data, train = recipe.stages, recipe.data, recipe.train
    if "train" in stages:
        if not data.train:
            faults.append(("stages data.train", "[data] train: expected one manifest or more, got none"))
        if data.dev is None and train.select != "last":
            text = f'[data] dev: train.select = "{train.select}" needs held-out data; give them, or "last"'
            faults.append(("stages data.dev train.select", text))
        if data.dev is None and train.patience:
            faults.append(("stages data.dev train.patience", "[data] dev: train.patience needs held-out data"))
        if recipe.checkpoint:
            text = "checkpoint: the stage train makes one; leave one of the two out"
            faults.append(("stages checkpoint", text))
    elif recipe.checkpoint is None and stages and "search" not in stages:
        faults.append(("stages checkpoint", "checkpoint: expected a trained model, since there is no stage train"))
    return faults


def _augmentation_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the faults of [augment] and [finetune_augment]."""
    faults: list[tuple[str, str]] = []
    for section in ("augment", "finetune_augment"):
        config = getattr(recipe, section)
        for key in ("snr_db", "level_db"):
            lowest, highest = getattr(config, key)
            if lowest > highest:
                text = f"[{section}] {key}: expected lowest and highest, got {[lowest, highest]}"
                faults.append((f"{section}.{key}", text))
        if not config.speed:
            faults.append((f"{section}.speed", f"[{section}] speed: expected one factor or more, got none"))
        if fine := [factor for factor in config.speed if round(factor, 2) != factor]:  # resampling would take ages
            faults.append((f"{section}.speed", f"[{section}] speed: expected two decimals at most, got {fine[0]}"))
    return faults


def _finetuning_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the faults of [finetune], and of its stage if the recipe names it."""
    faults: list[tuple[str, str]] = []
    stages, data = recipe.stages, recipe.data
    tuning = recipe.finetune
    for key in ("alpha", "anneal"):
        first, last = getattr(tuning, key)
        if first > last:
            faults.append(
                (f"finetune.{key}", f"[finetune] {key}: expected first and last, rising, got {[first, last]}")
            )
    if "finetune" in stages:
        if not data.train:
            faults.append(("stages data.train", "[data] train: expected one manifest or more, got none"))
        if data.dev is None:
            text = "[data] dev: the stage finetune needs held-out data, got none"
            faults.append(("stages data.dev", text))
    return faults


def _budget_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns a fault if the stage allocate does not have exactly one budget."""
    budgets = ALTERNATIVES["allocate"]
    given = [key for key in budgets if getattr(recipe.allocate, key) is not None]
    if "allocate" not in recipe.stages or len(given) == 1:
        return []
    text = f"[allocate] {budgets[0]}: expected exactly one of {', '.join(budgets)}; got {', '.join(given) or 'none'}"
    return [(" ".join(["stages", *(f"allocate.{key}" for key in budgets)]), text)]


def _data_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the faults of test sets, of calibration audio and of bit-widths, for the stages after the training."""
    faults: list[tuple[str, str]] = []
    stages, data = recipe.stages, recipe.data
    if {"evaluate", "compare"} & set(stages) and not data.test:
        text = "[data] test: expected one test set or more for the stages evaluate and compare, got none"
        faults.append(("stages data.test", text))
    for name in data.test:
        if not re.fullmatch(r"\w[\w.-]*", name):
            text = "expected a name of letters, digits, _, - and . (it names a folder)"
            faults.append(("data.test", f"[data] test.{json.dumps(name, ensure_ascii=False)}: {text}"))
    if "sensitivity" in stages and not (data.calibration or data.train):
        text = "[data] calibration: expected audio for the stage sensitivity (or train), got none"
        faults.append(("stages data.calibration data.train", text))
    for key in ("bits", "rates"):
        widths = getattr(recipe.sensitivity, key)
        if widths is not None and (len(set(widths)) != len(widths) or not widths):
            faults.append((f"sensitivity.{key}", f"[sensitivity] {key}: expected different widths, got {widths}"))
    return faults


_NEEDS = (
    ("allocate", "sensitivity"),
    ("pack", "allocate"),
    ("finetune", "allocate"),
    ("compare", "pack"),
    ("compare", "evaluate"),
)


def _model_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the faults of a model that is to be trained."""
    model, train = recipe.model, recipe.train
    faults = []

    def add(key: str, text: str, *others: str) -> None:
        section, _, name = key.partition(".")
        faults.append((" ".join([key, *others]), f"[{section}] {name}: {text}"))

    for key in ("heads", "decoder_heads"):
        if model.width % getattr(model, key) and (key == "heads" or model.decoder_layers):
            got = getattr(model, key)
            add(f"model.{key}", f"expected a divisor of width, {model.width}; got {got}", "model.width")
    if model.kernel_size % 2 == 0:
        add("model.kernel_size", f"expected an odd number, got {model.kernel_size}")
    if model.subsampling_factor < 2 or model.subsampling_factor & (model.subsampling_factor - 1):
        add("model.subsampling_factor", f"expected 2, 4, 8, ..., got {model.subsampling_factor}")
    for key in ("ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank"):
        value = getattr(model, key)
        if isinstance(value, list) and len(value) != model.layers:
            text = f"expected one number for each of the {model.layers} blocks, got {len(value)}"
            add(f"model.{key}", text, "model.layers")
    rank = _largest_rank(model)
    is_ranked = "search" in recipe.stages and recipe.search.space != "widths"
    if "S" in train.semi_orthogonal and not rank and not is_ranked:
        text = f'"{train.semi_orthogonal}" needs factored matrices (model.ffn_rank or model.ffn2_rank)'
        add("train.semi_orthogonal", text, "model.ffn_rank", "model.ffn2_rank")
    elif "S" in train.semi_orthogonal and rank > model.width:
        text = f"a rank of {rank} is above the width {model.width}, so a factor cannot be semi-orthogonal"
        add("train.semi_orthogonal", text, "model.ffn_rank", "model.ffn2_rank", "model.width")
    if not model.decoder_layers and train.ctc_weight != 1:
        text = "expected 1 for a model without a decoder (decoder_layers = 0)"
        add("train.ctc_weight", f"{text}, got {train.ctc_weight:g}", "model.decoder_layers")
    if model.decoder_layers and train.ctc_weight == 1:
        text = "1 would leave the decoder untrained; expected less, or decoder_layers = 0"
        add("train.ctc_weight", text, "model.decoder_layers")
    if recipe.decode.method == "joint" and not model.decoder_layers:
        add("decode.method", '"joint" needs a decoder (decoder_layers)', "model.decoder_layers")
    if recipe.sensitivity.output == "decoder" and not model.decoder_layers:
        add("sensitivity.output", '"decoder" needs a decoder (decoder_layers)', "model.decoder_layers")
    return faults


def _largest_rank(model: ModelConfig) -> int:
    """Returns the largest rank of a factored matrix, 0 where none is factored."""
    ranks = [model.ffn_rank, model.ffn2_rank or 0]
    return max(max(rank, default=0) if isinstance(rank, list) else rank for rank in ranks)


def _search_faults(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns the faults of an architecture search."""
    search, data = recipe.search, recipe.data
    faults = []

    def add(keys: str, name: str, text: str) -> None:
        faults.append((f"stages {keys}", f"{name}: {text}"))

    if not data.train:
        add("data.train", "[data] train", "expected one manifest or more, got none")
    if data.dev is None and recipe.train.select != "last":
        text = f'train.select = "{recipe.train.select}" needs held-out data; give them, or "last"'
        add("data.dev train.select", "[data] dev", text)
    if data.dev is None and search.held_out is None:
        add("data.dev search.held_out", "[search] held_out", "expected data to choose on (or data.dev), got none")
    given = [key for key in ALTERNATIVES["search"] if getattr(search, key) is not None]
    if len(given) != 1:
        text = f"expected one of eta and target_millions, got {' and '.join(given) or 'none'}"
        add("search.eta search.target_millions", "[search] eta", text)
    if search.trained and "train" not in recipe.stages:
        text = "true needs the stage train before the search (mpq run); leave it out: a checkpoint is begun with anyway"
        add("search.trained", "[search] trained", text)
    if search.loss == "distillation" and recipe.checkpoint is None and not search.trained:
        text = '"distillation" needs a trained model to imitate (checkpoint, or trained = true and the stage train)'
        add("search.loss search.trained checkpoint", "[search] loss", text)
    if search.temperature[0] < search.temperature[1]:
        text = f"expected first and last, falling, got {list(search.temperature)}"
        add("search.temperature", "[search] temperature", text)
    layers = recipe.model.layers if recipe.checkpoint is None else None
    for key, text in candidate_faults(search, layers):
        add(f"search.{key} search.space model.layers", f"[search] {key}", text)
    return faults
