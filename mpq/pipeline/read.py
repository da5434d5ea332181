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

from mpq.config import STAGES, SYNTHETIC_NOISE, AugmentConfig, Recipe, sections
from mpq.errors import MpqError
from mpq.faults import WORDS, Place, by_place, fault, named
from mpq.files import read_text
from mpq.pipeline.contradictions import ALTERNATIVES, contradictions, missing_files


def load_recipe(
    path: Path, overrides: Sequence[str] = (), stages: Sequence[str] | None = None, need_files: bool = True
) -> Recipe:
    """Returns the recipe in a TOML file; its `data.root`, `augment.noise` and `checkpoint` are made absolute.

    Args:
        path: The file.
        overrides: "section.key=value", the value as TOML (a bare word is a string).
        stages: Stages that replace the recipe's own.
        need_files: Whether a file that the stages read and that is not there is a fault.

    Raises:
        MpqError: All faults, a line each.
    """
    try:
        table = tomllib.loads(read_text(path).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise MpqError(f"{path}: not TOML: {error}") from None
    return _recipe(table, str(path), Path(path).resolve().parent, overrides, stages, need_files)


def make_recipe(
    table: dict[str, Any],
    overrides: Sequence[str],
    command: str,
    known: Sequence[str] | None = None,
    stages: Sequence[str] = (),
) -> Recipe:
    """Returns the recipe that a command's options make up; relative paths start at the working directory.

    Args:
        table: {section: {key: value}}.
        overrides: "section.key=value" for each value that replaces one of the table.
        command: The name of the command, for messages.
        known: The sections and keys that the command reads; None for all.
        stages: The stages that the recipe has to be complete for.

    Raises:
        MpqError: All faults, a line each; an override of what the command does not read.
    """
    for text in overrides:
        section = text.partition("=")[0].strip().split(".")[0]
        if known is not None and section in Recipe.model_fields and section not in known:
            raise MpqError(f"--set {text}: {command} does not read {section}; it reads {', '.join(known)}")
    return _recipe(table, command, Path.cwd(), overrides, stages, need_files=False)


def _recipe(
    table: dict[str, Any],
    path: str,
    folder: Path,
    overrides: Sequence[str],
    stages: Sequence[str] | None,
    need_files: bool,
) -> Recipe:
    """Returns the recipe in a table that came from `path`."""
    named = {text.partition("=")[0].strip() for text in overrides}
    for section, alternatives in ALTERNATIVES.items():
        if named & {f"{section}.{key}" for key in alternatives} and isinstance(table.get(section), dict):
            table[section] = {key: value for key, value in table[section].items() if key not in alternatives}
    faults = [fault for text in overrides if (fault := _override(table, text))]
    if stages is not None:
        table["stages"] = list(stages)
    elif table.get("stages") == []:
        faults.append(f"stages: expected one or more of {', '.join(STAGES)}")
    dropped: set[str] = set()
    try:
        recipe = Recipe.model_validate(_with_tuples(table, Recipe))
    except ValidationError as error:
        found = _faults(table, error)
        faults += found.values()
        for location in found:
            _drop(table, location)
            dropped.add(".".join(map(str, location[:2])))
        recipe = Recipe.model_validate(_with_tuples(table, Recipe))  # what else is wrong, those keys aside
    recipe = _resolved(recipe, folder)
    others = contradictions(recipe) + (missing_files(recipe) if need_files else [])
    faults += [fault for keys, fault in others if not _depends(keys, dropped)]
    if faults:
        raise MpqError(_listed(path, faults))
    return recipe


def _listed(path: str, faults: Sequence[str]) -> str:
    return "\n".join(f"{path}: {fault}" for fault in dict.fromkeys(faults))


def _depends(keys: str, dropped: set[str]) -> bool:
    """Returns whether a fault is about keys ("model.width stages") one of which is at fault itself."""
    return any(key in dropped or key.split(".")[0] in dropped for key in keys.split())


def _drop(table: dict[str, Any], location: Sequence[Any]) -> None:
    """Takes the key that a fault is about out of a table: the whole list where it is about an item of one."""
    for key, inner in zip(location, [*location[1:], None], strict=True):
        if not isinstance(table.get(key), dict) or inner is None:
            table.pop(key, None)
            return
        table = table[key]


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Returns the recipe with absolute paths."""
    root = os.path.normpath(folder / recipe.data.root)

    def with_noise(config: AugmentConfig) -> AugmentConfig:
        noise = [name if name in SYNTHETIC_NOISE else os.path.normpath(Path(root) / name) for name in config.noise]
        return config.model_copy(update={"noise": noise})

    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"root": root}),
            "augment": with_noise(recipe.augment),
            "finetune_augment": with_noise(recipe.finetune_augment),
            "checkpoint": recipe.checkpoint and os.path.normpath(folder / recipe.checkpoint),
            "search": recipe.search.model_copy(
                update={"supernet": recipe.search.supernet and os.path.normpath(folder / recipe.search.supernet)}
            ),
        }
    )


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


_WORDS = WORDS | {"string_type": "text in quotes", "dict_type": "a table", "model_type": "a section"}
"""Names of expected values, by the type of pydantic's error, in the words of TOML."""


def _faults(table: dict[str, Any], error: ValidationError) -> dict[Place, str]:
    """Returns pydantic's errors in the words of this project, [section] key: expected ..., got ..., by place."""
    return {
        place: f"{_where(place)}: "
        + (_unknown(place) if entries[0]["type"] == "extra_forbidden" else fault(entries, _WORDS))
        for place, entries in by_place(error, table).items()
    }


def _unknown(place: Sequence[Any]) -> str:
    """Returns what to do about a key that there is not."""
    key, known = str(place[-1]), _known(place[:-1])
    near = difflib.get_close_matches(key, known, 1)
    others = [f"[{name}]" for name, section in sections().items() if key in section.model_fields]
    hint = f"did you mean {near[0]}? " if near else f"did you mean that of {' or '.join(others)}? " if others else ""
    return f"unknown key; {hint}known: {', '.join(known)}"


def _where(place: Place) -> str:
    if len(place) > 1 and place[0] in sections():
        return f"[{place[0]}] {named(place[1:])}"
    return named(place)


def _known(location: Sequence[Any]) -> list[str]:
    section = sections().get(location[0]) if location else None
    return list((section or Recipe).model_fields)
