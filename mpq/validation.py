"""Reading JSON that a person or another tool may have written: every fault names file, key, expected and got."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpq.errors import MpqError

# A converter returns the value or raises ValueError with what was expected.


def a_text(value: Any) -> str:
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise ValueError("a string (of Unicode characters)")
    return value


def a_text_or_none(value: Any) -> str | None:
    return None if value is None else a_text(value)


def an_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


def a_whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError("a whole number, 0 or more (and less than 2^53)")
    return value


def a_positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number, 1 or more")
    return value


def a_finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e100 < value < 1e100:
        raise ValueError("a finite number (smaller than 1e100)")
    return float(value)


def a_finite_or_none(value: Any) -> float | None:
    return None if value is None else a_finite(value)


def a_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list")
    return value


_REQUIRED = object()


class Reader:
    """A JSON object that knows where it came from.

    Args:
        path: The file.
        value: The object.
        where: The object's place in the file, such as "layers[3].".
    """

    def __init__(self, path: Path, value: dict[str, Any], where: str = "") -> None:
        self.path, self.value, self.where = path, value, where

    def fail(self, key: str, expected: str, got: Any) -> None:
        raise MpqError(f"{self.path}: {self.where}{key}: expected {expected}, got {json.dumps(got)[:80]}")

    def has(self, key: str) -> bool:
        return self.value.get(key) is not None

    def get(self, key: str, convert: Callable[[Any], Any], default: Any = _REQUIRED) -> Any:
        if key not in self.value:
            if default is _REQUIRED:
                raise MpqError(f"{self.path}: {self.where}{key}: this key is missing")
            return default
        try:
            return convert(self.value[key])
        except ValueError as error:
            return self.fail(key, str(error), self.value[key])

    def sequence(self, key: str, convert: Callable[[Any], Any], default: Any = _REQUIRED) -> tuple[Any, ...]:
        values = self.get(key, a_list, default)
        result = []
        for index, value in enumerate(values):
            try:
                result.append(convert(value))
            except ValueError as error:
                self.fail(f"{key}[{index}]", str(error), value)
        return tuple(result)

    def objects(self, key: str) -> list["Reader"]:
        return [
            Reader(self.path, value, f"{self.where}{key}[{index}].")
            for index, value in enumerate(self.sequence(key, an_object))
        ]

    def mapping(self, key: str, keys: tuple[int, ...], convert: Callable[[Any], Any]) -> dict[int, Any]:
        """Returns the object at `key`, which must have every one of `keys` (written as strings)."""
        values = Reader(self.path, self.get(key, an_object), f"{self.where}{key}.")
        return {name: values.get(str(name), convert) for name in keys}
