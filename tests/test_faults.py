"""What pydantic finds wrong, in the words of this project."""

import doctest
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, Strict

from mpq import faults
from mpq.errors import MpqError
from mpq.faults import Count, JsonObject, Number, Text, checked, shown


class Inner(JsonObject):
    names: list[Text] = Field(default_factory=list)
    pair: Annotated[tuple[Count, Number], Strict(False)] = (0, 0.0)


class Outer(JsonObject):
    inner: Inner
    either: Text | int | list[int] = ""
    counts: dict[str, Count] = Field(default_factory=dict)


def test_doctests() -> None:
    result = doctest.testmod(faults)
    assert result.attempted >= 1 and result.failed == 0


@pytest.mark.parametrize(
    "value, words",
    [
        ({}, "inner: this key is missing"),
        ({"inner": []}, "inner: expected an object, got []"),
        ({"inner": {"names": {}}}, "inner.names: expected a list, got {}"),
        ({"inner": {"names": ["a", 3]}}, "inner.names[1]: expected a string, got 3"),
        ({"inner": {"names": ["\ud800"]}}, "inner.names[0]: expected a string of Unicode characters, got"),
        ({"inner": {"pair": [1]}}, "inner.pair: expected an item more, got [1]"),
        ({"inner": {"pair": [1, 2, 3]}}, "inner.pair: expected 2 items, got [1, 2, 3]"),
        ({"inner": {"pair": [True, 1]}}, "inner.pair[0]: expected a whole number, got true"),
        ({"inner": {"pair": [2**53, 1]}}, "inner.pair[0]: expected less than 9007199254740992, got 9007199254740992"),
        ({"inner": {"pair": [1, float("nan")]}}, "inner.pair[1]: expected a finite number, got NaN"),
        ({"inner": {"pair": [1, 1e100]}}, "inner.pair[1]: expected less than 1e+100, got 1e+100"),
        ({"inner": {"pair": [1, 10**400]}}, "inner.pair[1]: expected a number, got 1000"),
        ({"inner": {}, "either": 1.5}, "either: expected a string or a whole number or a list, got 1.5"),
        ({"inner": {}, "either": [1, "x"]}, 'either[1]: expected a whole number, got "x"'),
        ({"inner": {}, "counts": {"int": -1}}, "counts.int: expected 0 or more, got -1"),
    ],
)
def test_the_first_fault_is_named_with_its_place(value: dict[str, object], words: str) -> None:
    with pytest.raises(MpqError) as caught:
        checked(Outer, value, Path("f.json"))
    assert str(caught.value).startswith(f"f.json: {words}")


def test_what_is_right_is_taken_as_it_is() -> None:
    found = checked(Outer, {"inner": {"pair": [1, 2], "new": 0}, "either": 7}, Path("f.json"))
    assert found == Outer(inner=Inner(pair=(1, 2.0)), either=7)
    assert isinstance(found.inner.pair[1], float)


def test_what_was_got_is_cut_where_it_is_long() -> None:
    assert shown("\u00e4" * 99) == '"' + "\u00e4" * 56 + "..."
    assert shown("\ud800") == '"\\ud800"'
