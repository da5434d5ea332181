"""Which values the types of a recipe's keys take, by hand."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from mpq.config import types
from mpq.config.types import Section


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("Whole", [1, 10**9], [0, -1, 1.5, "1", True]),
        ("Count", [0, 1], [-1, 0.5]),
        ("Seed", [0, 2**31 - 1], [-1, 2**31]),
        ("Name", ["a"], ["", 3]),
        ("Positive", [1e-9, 1, 3.5], [0, -1.0, "1"]),
        ("NonNegative", [0, 0.5], [-1e-9]),
        ("Fraction", [0, 0.5, 1], [-0.1, 1.1]),
        ("Share", [0, 0.999], [1, -0.1]),
        ("PerBlock", [8, [8, 9]], [0, [8, 0], [8.5], "8"]),
        ("Ranks", [0, [0, 3]], [-1, [-1]]),
        ("Candidates", [[8, 9], [[8], [9, 10]]], [8, [0], [[0]], [8, [9]]]),
        ("Output", ["ctc", "encoder", "decoder"], ["CTC", ""]),
        ("ScoreMethod", ["fisher", "kl"], ["exact"]),
        ("DecodeMethod", ["greedy", "prefix", "joint"], ["beam"]),
    ],
)
def test_values(name: str, taken: list[Any], refused: list[Any]) -> None:
    adapter = TypeAdapter(getattr(types, name))
    for value in taken:
        assert adapter.validate_python(value, strict=True) == value
    for value in refused:
        with pytest.raises(ValidationError):
            adapter.validate_python(value, strict=True)


class Kettle(Section):
    """A section with a key."""

    litres: types.Positive = 1.5


@pytest.mark.parametrize(
    "table", [{"liters": 1.0}, {"litres": "2"}, {"litres": float("nan")}, {"litres": float("inf")}]
)
def test_a_section_refuses_what_it_does_not_know(table: dict[str, Any]) -> None:
    assert Kettle.model_validate({"litres": 2}).litres == 2
    with pytest.raises(ValidationError):
        Kettle.model_validate(table)


def test_a_section_does_not_change_after_reading() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Kettle().litres = 2.0
