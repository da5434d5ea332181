"""The faults of a recipe, or of JSON that others wrote, in words: the place, the expected value and the present one.

pydantic finds the faults; here they are put into the words of this project.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from mpq.errors import MpqError

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def _whole_text(text: str) -> str:
    if _HALF_PAIR.search(text):
        raise PydanticCustomError("half_pair", "a string of Unicode characters")
    return text


Text = Annotated[str, AfterValidator(_whole_text)]
"""A string that can be written as UTF-8: JSON may hold halves of surrogate pairs."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A whole number that other tools read as it is, too."""
Number = Annotated[float, Field(gt=-1e100, lt=1e100)]
"""A finite number whose sums are finite."""


class JsonObject(BaseModel):
    """An object of a JSON file; keys that it does not know are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


WORDS = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "text of the form {pattern}",
    "missing": "an item more",
    "too_long": "{max_length} items",
}
"""Names of expected values, by the type of pydantic's error."""

Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], value: Mapping[str, Any], path: Path) -> Model:
    """Returns a JSON object that was read from a file, as a model.

    Raises:
        MpqError: It is not such an object; the first fault, with the file and the key.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        place, entries = next(iter(by_place(error, value).items()))
        raise MpqError(f"{path}: {named(place)}: {fault(entries)}") from None


def check_different(names: Iterable[str]) -> None:
    """Raises pydantic's error, for use in its validators, if a name is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PydanticCustomError("names", "different names, not {name} twice", {"name": name})
        seen.add(name)


def by_place(error: ValidationError, value: Any) -> dict[Place, list[ErrorDetails]]:
    """Returns pydantic's errors by where they are in the value that was validated.

    The alternatives of a union are at one place; where something is wrong inside a list, that counts and not what is
    wrong with the list.
    """
    places: dict[Place, list[ErrorDetails]] = {}
    for entry in error.errors(include_url=False):
        places.setdefault(_place(value, entry), []).append(entry)
    return {
        place: entries
        for place, entries in places.items()
        if not any(other[: len(place)] == place and len(other) > len(place) for other in places)
    }


def fault(entries: Sequence[ErrorDetails], words: Mapping[str, str] = WORDS) -> str:
    """Returns "expected ..., got ..." of the errors at one place, or that a key is missing.

    Args:
        entries: The errors at that place, as `by_place` returns them.
        words: Names of expected values, by the type of the error.
    """
    if _lacks_key(entries[0]):
        return "this key is missing"
    expected = dict.fromkeys(_expected(entry, words) for entry in entries)
    return f"expected {' or '.join(expected)}, got {shown(entries[0]['input'])}"


def named(place: Place) -> str:
    """Returns a place as a person writes it.

    >>> named(("layers", 3, "kl", "4"))
    'layers[3].kl.4'
    """
    return ".".join(f"[{part}]" if isinstance(part, int) else part for part in place).replace(".[", "[")


def shown(value: Any) -> str:
    """Returns a value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expected(entry: ErrorDetails, words: Mapping[str, str]) -> str:
    if entry["type"] not in words:
        return re.sub(r"^Input should be ", "", entry["msg"])
    context = {
        key: f"{value:g}" if isinstance(value, float) else str(value).strip("^$")
        for key, value in entry.get("ctx", {}).items()
    }
    return words[entry["type"]].format(**context)


def _lacks_key(entry: ErrorDetails) -> bool:
    return entry["type"] == "missing" and isinstance(entry["loc"][-1], str)


def _place(value: Any, entry: ErrorDetails) -> Place:
    """Returns where in the value an error is, without the names that pydantic gives to the alternatives of a union."""
    place: list[str | int] = []
    *parents, last = entry["loc"] or ("",)
    for part in entry["loc"] if entry["type"] != "missing" else parents:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        else:
            continue
        place.append(part)
    return (*place, last) if _lacks_key(entry) else tuple(place)
