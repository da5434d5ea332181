"""Floors, exclusions and ties turned into options; fnmatch is the witness of what a pattern matches."""

import fnmatch
import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.allocation.decisions import FREE, Constraints, list_decisions
from mpq.errors import MpqError
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable

BITS = (2, 4, 8)
NAMES = ("enc.0.q", "enc.0.k", "enc.1.q", "enc.1.k", "head")


def table(*names: str) -> SensitivityTable:
    layers = [
        LayerSensitivity(
            name=name,
            kind="linear",
            shape=(8 * index,),
            numel=8 * index,
            size_bytes={bits: bits * index + 3 for bits in BITS},
            kl={bits: index / bits for bits in BITS},
            float_bytes=16 * index,
        )
        for index, name in enumerate(names, 1)
    ]
    return SensitivityTable(tuple(layers), BITS, fixed_bytes=100)


def tied(names: tuple[str, ...], *patterns: str) -> set[tuple[str, ...]]:
    """Returns the sets of layers that share a width."""
    decisions = list_decisions(table(*names), Constraints(tie=patterns))
    return {tuple(names[index] for index in one.layers) for one in decisions}


def test_each_layer_is_a_decision_of_its_own() -> None:
    t = table(*NAMES)
    found = list_decisions(t, FREE)
    assert [one.layers for one in found] == [(0,), (1,), (2,), (3,), (4,)]
    for layer, one in zip(t.layers, found, strict=True):
        assert one.bits == BITS and one.code_bits == tuple(layer.numel * bits for bits in BITS)
        assert one.size_bytes == tuple(layer.size_bytes.values()) and one.cost == tuple(layer.kl.values())


def test_tied_layers_add_up_and_keep_the_highest_floor() -> None:
    t = table(*NAMES)
    found = list_decisions(t, Constraints(keep={"enc.0.k": 3, "*": 2}, tie=["enc.0.?"]))
    (one,) = (one for one in found if one.layers == (0, 1))
    assert one.bits == (4, 8) and len(found) == 4
    pair = t.layers[:2]
    assert one.size_bytes == tuple(sum(layer.size_bytes[bits] for layer in pair) for bits in (4, 8))
    assert one.cost == tuple(math.fsum(layer.kl[bits] for layer in pair) for bits in (4, 8))


def test_an_excluded_layer_has_one_option() -> None:
    found = list_decisions(table(*NAMES), Constraints(exclude=["head"]))[-1]
    assert (found.bits, found.size_bytes, found.cost, found.code_bits) == ((16,), (80,), (0.0,), (5 * 8 * 16,))


def test_what_each_star_stands_for() -> None:
    assert tied(NAMES, "enc.*.[qk]") == {("enc.0.q", "enc.0.k"), ("enc.1.q", "enc.1.k"), ("head",)}
    assert tied(NAMES, "enc.?.*") == {("enc.0.q", "enc.1.q"), ("enc.0.k", "enc.1.k"), ("head",)}
    assert tied(NAMES, "*.?.*", "h*d") == tied(NAMES, "enc.?.*")
    # inside brackets a * is a character like others, as it is for fnmatch
    assert tied(("a*1", "a*2", "ab3"), "a[*]?") == {("a*1", "a*2"), ("ab3",)}
    assert tied(NAMES, "enc.[*0].?") == {("enc.0.q", "enc.0.k"), ("enc.1.q",), ("enc.1.k",), ("head",)}
    assert tied(NAMES, "enc.[!*0].?") == {("enc.0.q",), ("enc.0.k",), ("enc.1.q", "enc.1.k"), ("head",)}
    # a bracket that nothing closes is a character too; the first of what is inside may be a bracket
    assert tied(("a[1", "a[2", "a.3"), "a[?") == {("a[1", "a[2"), ("a.3",)}
    assert tied(("[!]1", "[!]2", "b"), "[!]?") == {("[!]1", "[!]2"), ("b",)}
    assert tied(("]1", "]2", "b"), "[]]?") == {("]1", "]2"), ("b",)}


TEXTS = st.text("ab*?[]!-\\.\n", min_size=1, max_size=6)


@given(st.lists(TEXTS, min_size=1, max_size=4, unique=True), TEXTS)
def test_layers_that_a_tie_leaves_alone_are_those_that_fnmatch_does(names: list[str], pattern: str) -> None:
    matching = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    if not matching:
        with pytest.raises(MpqError, match="matches none"):
            tied(tuple(names), pattern)
        return
    groups = tied(tuple(names), pattern)
    assert sorted(itertools.chain(*groups)) == sorted(names)
    assert all(set(group) <= matching for group in groups if len(group) > 1)
    if "*" not in pattern:
        assert tuple(name for name in names if name in matching) in groups


@pytest.mark.parametrize(
    "constraints, words",
    [
        (Constraints(keep={"x*": 4}), r"keep x\*: matches none of the 5 layers, such as enc\.0\.q"),
        (Constraints(tie=["x*"]), r"tie x\*: matches none"),
        (Constraints(exclude=["ENC*"]), r"exclude ENC\*: matches none"),
        (Constraints(keep={"head": 9}), "keep head=9: expected a whole number from 1 to 8"),
        (Constraints(keep={"head": True}), "expected a whole number"),
        (Constraints(keep={"head": 8}, exclude=["h*"]), r"exclude h\*: head has a floor of 8 bits from keep"),
        (Constraints(exclude=["enc.0.q"], tie=["enc.0.?"]), r"exclude: enc\.0\.k is tied to an excluded layer"),
    ],
)
def test_what_cannot_be_asked(constraints: Constraints, words: str) -> None:
    with pytest.raises(MpqError, match=words):
        list_decisions(table(*NAMES), constraints)


def test_a_floor_above_what_was_measured() -> None:
    narrow = replace(table(*NAMES), bits=(2, 4))
    with pytest.raises(MpqError, match="keep head=5: the widths that were measured end at 4"):
        list_decisions(narrow, Constraints(keep={"head": 5}))
