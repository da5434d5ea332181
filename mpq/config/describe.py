"""The schema of recipes as text, for docs/recipes.md and the help of options."""

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from mpq.config.recipe import Recipe, sections


def describe() -> Iterable[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Yields (section, what it is, [(key, type, default, description)]) of the whole schema, for the documentation."""
    for name, section in ({"": Recipe} | sections()).items():
        yield name, (section.__doc__ or "").strip(), describe_section(section)


def describe_section(section: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Returns [(key, type, default, description)] of a section, or of the keys of a recipe that are in none."""
    return [
        (
            key,
            _type_name(field.annotation),
            _toml(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for key, field in section.model_fields.items()
        if section is not Recipe or key not in sections()
    ]


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " \\| ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " \\| ".join(_type_name(one) for one in arguments if one is not type(None))
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "table"
    return {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}[kind.__name__]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return ""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)
