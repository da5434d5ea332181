"""Recipe files: TOML -> `mpq.config.Recipe`.

Everything that is wrong with a recipe is told together: unknown keys, wrong types, values out of range, options that
contradict each other, files that are not there.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from mpq.config import STAGES, SYNTHETIC_NOISE, ModelConfig, Recipe, sections
from mpq.errors import MpqError


def load_recipe(
    path: Path, overrides: Sequence[str] = (), stages: Sequence[str] | None = None, need_files: bool = True
) -> Recipe:
    """Returns the recipe in a TOML file; its `data.root`, `augment.noise` and `checkpoint` are made absolute.

    Args:
        path: The file.
        overrides: "section.key=value", the value as TOML (a bare word is a string).
        stages: Instead of the recipe's own.
        need_files: Whether a file that the stages read and that is not there is a fault.

    Raises:
        MpqError: All faults, a line each.
    """
    try:
        table = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MpqError(f"{path}: not TOML: {error}") from None
    faults = [fault for text in overrides if (fault := _override(table, text))]
    if stages is not None:
        table["stages"] = list(stages)
    try:
        recipe = Recipe.model_validate(_with_tuples(table, Recipe))
        dropped: set[str] = set()
    except ValidationError as error:
        entries = [dict(entry) for entry in error.errors()]
        faults += [_fault(entry) for entry in entries]
        dropped = {_drop(table, _location(entry)) for entry in entries}
        if "stages" in dropped:
            table["stages"] = []
        try:
            recipe = Recipe.model_validate(_with_tuples(table, Recipe))  # what else is wrong, those keys aside
        except ValidationError:
            raise MpqError(_listed(path, faults)) from None
    recipe = _resolved(recipe, Path(path).resolve().parent)
    others = _contradictions(recipe) + (_missing_files(recipe) if need_files else [])
    faults += [fault for fault in others if not any(re.search(rf"\b{key}\b", fault) for key in dropped)]
    if faults:
        raise MpqError(_listed(path, faults))
    return recipe


def _listed(path: Path, faults: Sequence[str]) -> str:
    return "\n".join(f"{path}: {fault}" for fault in dict.fromkeys(faults))


def _drop(table: dict[str, Any], location: Sequence[Any]) -> str:
    """Takes the key that a fault is about out of a table; returns its name."""
    key = str(location[0])
    for key, inner in zip(map(str, location), [*location[1:], 0], strict=True):
        if not isinstance(table.get(key), dict) or isinstance(inner, int):
            break
        table = table[key]
    table.pop(key, None)
    return key


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Returns the recipe with absolute paths."""
    root = os.path.normpath(folder / recipe.data.root)
    noise = [name if name in SYNTHETIC_NOISE else os.path.normpath(Path(root) / name) for name in recipe.augment.noise]
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"root": root}),
            "augment": recipe.augment.model_copy(update={"noise": noise}),
            "checkpoint": recipe.checkpoint and os.path.normpath(folder / recipe.checkpoint),
        }
    )


def _missing_files(recipe: Recipe) -> list[str]:
    """Returns a line for each file or folder that the recipe's stages read and that is not there."""
    wanted = [("checkpoint", recipe.checkpoint)] if "train" not in recipe.stages else []
    if "train" in recipe.stages:
        wanted += [(f"data.train[{i}]", recipe.path(name)) for i, name in enumerate(recipe.data.train)]
        wanted += [("data.dev", recipe.data.dev and recipe.path(recipe.data.dev))]
        wanted += [("augment.noise", name) for name in recipe.augment.noise if name not in SYNTHETIC_NOISE]
    if {"evaluate", "compare"} & set(recipe.stages):
        wanted += [(f"data.test.{key}", recipe.path(name)) for key, name in recipe.data.test.items()]
    if "sensitivity" in recipe.stages and recipe.data.calibration:
        wanted += [("data.calibration", recipe.path(recipe.data.calibration))]
    return [f"{key}: {path}: no such file or folder" for key, path in wanted if path and not Path(path).exists()]


def _contradictions(recipe: Recipe) -> list[str]:
    """Returns what no single key shows."""
    faults = []
    stages = list(recipe.stages)
    if stages != [stage for stage in STAGES if stage in stages]:
        faults.append(f"stages: expected each at most once and in the order {', '.join(STAGES)}; got {stages}")
    if "train" in stages:
        if not recipe.data.train:
            faults.append("[data] train: expected one manifest or more, got none")
        if recipe.data.dev is None and recipe.train.select != "last":
            faults.append(
                f'[data] dev: train.select = "{recipe.train.select}" needs held-out data; give them, or "last"'
            )
        if recipe.data.dev is None and recipe.train.patience:
            faults.append("[data] dev: train.patience needs held-out data")
    elif recipe.checkpoint is None and stages:
        faults.append("checkpoint: expected a trained model, since there is no stage train")
    if recipe.checkpoint and "train" in stages:
        faults.append("checkpoint: the stage train makes one; leave one of the two out")
    if "train" in stages or recipe.checkpoint is None:
        if not recipe.model.decoder_layers and recipe.train.ctc_weight != 1:
            faults.append("[train] ctc_weight: expected 1 for a model without a decoder (decoder_layers = 0)")
        if recipe.model.decoder_layers and recipe.train.ctc_weight == 1:
            faults.append(
                "[train] ctc_weight: 1 would leave the decoder untrained; expected less, or decoder_layers = 0"
            )
        if recipe.decode.method == "joint" and not recipe.model.decoder_layers:
            faults.append('[decode] method: "joint" needs a decoder (decoder_layers)')
    if (recipe.tokens.type == "bpe") != (recipe.tokens.vocabulary_size is not None):
        faults.append("[tokens] vocabulary_size: expected with type bpe, and only there")
    faults += _model_faults(recipe.model)
    if recipe.augment.snr_db[0] > recipe.augment.snr_db[1]:
        faults.append(f"[augment] snr_db: expected lowest and highest, got {list(recipe.augment.snr_db)}")
    if not recipe.augment.speed:
        faults.append("[augment] speed: expected one factor or more")
    budgets = ("target_mb", "target_ratio", "average_bits", "max_divergence")
    given = [key for key in budgets if getattr(recipe.allocate, key) is not None]
    if "allocate" in stages and len(given) != 1:
        faults.append(f"[allocate]: expected exactly one of {', '.join(budgets)}; got {', '.join(given) or 'none'}")
    for stage, needs in (
        ("allocate", "sensitivity"),
        ("pack", "allocate"),
        ("compare", "pack"),
        ("compare", "evaluate"),
    ):
        if stage in stages and needs not in stages:
            faults.append(f"stages: {stage} needs {needs} before it")
    if {"evaluate", "compare"} & set(stages) and not recipe.data.test:
        faults.append("[data.test]: expected one test set or more for the stages evaluate and compare")
    if "sensitivity" in stages and not (recipe.data.calibration or recipe.data.train):
        faults.append("[data] calibration: expected audio for the stage sensitivity (or train)")
    if len(set(recipe.sensitivity.bits)) != len(recipe.sensitivity.bits) or not recipe.sensitivity.bits:
        faults.append(f"[sensitivity] bits: expected different widths, got {recipe.sensitivity.bits}")
    return faults


def _model_faults(model: ModelConfig) -> list[str]:
    faults = []
    for key in ("heads", "decoder_heads"):
        if model.width % getattr(model, key):
            faults.append(f"[model] {key}: expected a divisor of width, {model.width}; got {getattr(model, key)}")
    if model.kernel_size % 2 == 0:
        faults.append(f"[model] kernel_size: expected an odd number, got {model.kernel_size}")
    if model.subsampling_factor < 2 or model.subsampling_factor & (model.subsampling_factor - 1):
        faults.append(f"[model] subsampling_factor: expected 2, 4, 8, ..., got {model.subsampling_factor}")
    for key in ("ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank"):
        value = getattr(model, key)
        if isinstance(value, list) and len(value) != model.layers:
            faults.append(f"[model] {key}: expected one number for each of the {model.layers} blocks, got {len(value)}")
    return faults


def _override(table: dict[str, Any], text: str) -> str | None:
    """Puts "section.key=value" into a table; returns what is wrong with it, None if nothing is."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(re.fullmatch(r"[\w-]+", key) for key in keys):
        return f"--set: expected section.key=value, got {text!r}"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            return f"--set {name}: {key} is no section"
    table[keys[-1]] = parsed
    return None


def _with_tuples(table: Any, section: type[BaseModel]) -> Any:
    """Returns a table in which what the schema wants as a tuple is one: TOML has lists alone."""
    if not isinstance(table, dict):
        return table
    result = dict(table)
    for key, field in section.model_fields.items():
        if key not in table:
            continue
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            result[key] = _with_tuples(table[key], kind)
        elif get_origin(kind) is tuple and isinstance(table[key], list):
            result[key] = tuple(table[key])
    return result


def _fault(entry: dict[str, Any]) -> str:
    """Returns pydantic's error in the words of this project: [section] key: expected ..., got ..."""
    location = _location(entry)
    where = _where(location)
    if entry["type"] == "extra_forbidden":
        known = _known(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: unknown key; {hint}known: {', '.join(known)}"
    expected = re.sub(r"^(Input|Value|List|Tuple) should (be|have) ?", "", entry["msg"])
    return f"{where}: expected {expected}, got {str(entry['input'])[:60]!r}"


def _location(entry: dict[str, Any]) -> list[Any]:
    return [part for part in entry["loc"] if isinstance(part, int) or _is_key(part)]


def _is_key(part: str) -> bool:
    """Returns whether a part of pydantic's location is a key, not the name of an alternative in a union."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*", part)) and part not in ("int", "str", "float", "list", "function-after")


def _where(location: Sequence[Any]) -> str:
    names = [f"[{part}]" if isinstance(part, int) else str(part) for part in location]
    if len(names) > 1 and isinstance(location[0], str) and location[0] in sections():
        return f"[{names[0]}] " + ".".join(names[1:]).replace(".[", "[")
    return ".".join(names).replace(".[", "[")


def _known(location: Sequence[Any]) -> list[str]:
    section = sections().get(location[0]) if location else None
    return list((section or Recipe).model_fields)
