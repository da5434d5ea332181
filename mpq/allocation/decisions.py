"""The decisions about a model's layers: floors, exclusions and ties turned into options.

A decision is one layer, or several that share one bit-width; its options are the widths that were measured, each with
its bytes in the packed file and its divergence.
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpq.errors import MpqError
from mpq.quantization.spec import FLOAT_BITS, QuantSpec, is_width, widths_of
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable


@dataclass(frozen=True)
class Constraints:
    """The user's demands on single layers. Patterns are globs on layer names (case-sensitive).

    Attributes:
        keep: {pattern: bits}: layers that match get at least so many bits.
        exclude: Patterns of layers that are left unquantized: they take their `float_bytes` and cost no divergence.
        tie: Patterns; layers that match one, with the same text in place of each `*`, share one bit-width, in addition
            to the groups of the table.
    """

    keep: Mapping[str, float] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    tie: Sequence[str] = ()


FREE = Constraints()
"""No demands on single layers."""


@dataclass(frozen=True)
class Decision:
    """Layers that share one bit-width.

    Attributes:
        layers: The layers' indices in the table.
        bits: The widths to choose from.
        size_bytes, cost, code_bits: Sums over the layers, for each of the widths; the cost is the divergence in nats
            per frame, code_bits the bits of the codes alone.
    """

    layers: tuple[int, ...]
    bits: tuple[float, ...]
    size_bytes: tuple[int, ...]
    cost: tuple[float, ...]
    code_bits: tuple[int, ...]


def list_decisions(table: SensitivityTable, constraints: Constraints) -> list[Decision]:
    """Returns the decisions: one for each layer or set of tied layers, with its allowed widths.

    Args:
        table: The layers, with their sizes and divergences.
        constraints: The demands on single layers.

    Raises:
        MpqError: A pattern matches nothing or contradicts another, or a layer has no size to be excluded with.
    """
    names = [layer.name for layer in table.layers]
    floors = _floors(table, names, constraints.keep)
    excluded = _exclusions(table, names, constraints.exclude, floors)
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(_groups(table.layers, constraints.tie)):
        groups.setdefault(group, []).append(index)
    decisions = []
    for members in groups.values():
        if not excluded & set(members):
            decisions.append(_tied(table, members, max(floors[index] for index in members)))
        elif left := [names[index] for index in members if index not in excluded]:
            raise MpqError(f"exclude: {left[0]} is tied to an excluded layer; exclude it too")
        else:
            decisions += [_excluded(index, table.layers[index]) for index in members]
    return decisions


def _floors(table: SensitivityTable, names: Sequence[str], keep: Mapping[str, float]) -> list[float]:
    """Returns the least width that `keep` allows each layer, 0 where it says nothing."""
    floors = [0.0] * len(names)
    scheme = table.quantizer.get("scheme", QuantSpec.scheme)
    for pattern, bits in keep.items():
        if not is_width(bits, scheme):
            raise MpqError(f"keep {pattern}={bits}: expected {widths_of(scheme)}")
        if bits > max(table.bits):
            raise MpqError(f"keep {pattern}={bits}: the widths that were measured end at {max(table.bits)}")
        for index in _matches(names, pattern, "keep"):
            floors[index] = max(floors[index], bits)
    return floors


def _exclusions(
    table: SensitivityTable, names: Sequence[str], exclude: Sequence[str], floors: Sequence[float]
) -> set[int]:
    """Returns the layers that `exclude` leaves unquantized."""
    excluded: set[int] = set()
    for pattern in exclude:
        for index in _matches(names, pattern, "exclude"):
            if floors[index]:
                raise MpqError(f"exclude {pattern}: {names[index]} has a floor of {floors[index]:g} bits from keep")
            if table.layers[index].float_bytes is None:
                raise MpqError(f"exclude {pattern}: {names[index]} has no float_bytes in the sensitivity file")
            excluded.add(index)
    return excluded


def _tied(table: SensitivityTable, members: Sequence[int], floor: float) -> Decision:
    """Returns the decision about layers that share a width of at least `floor` bits."""
    layers = [table.layers[index] for index in members]
    widths = tuple(bits for bits in table.bits if bits >= floor)
    return Decision(
        layers=tuple(members),
        bits=widths,
        size_bytes=tuple(sum(layer.size_bytes[bits] for layer in layers) for bits in widths),
        cost=tuple(math.fsum(layer.kl[bits] for layer in layers) for bits in widths),
        code_bits=tuple(sum(math.ceil(layer.numel * bits) for layer in layers) for bits in widths),
    )


def _excluded(index: int, layer: LayerSensitivity) -> Decision:
    """Returns the decision about a layer that stays unquantized: it has one option."""
    assert layer.float_bytes is not None
    bits = 8 * layer.float_bytes // layer.numel
    if bits not in FLOAT_BITS or layer.float_bytes * 8 != bits * layer.numel:
        expected = " or ".join(str(bits * layer.numel // 8) for bits in FLOAT_BITS)
        raise MpqError(f"exclude: {layer.name}: float_bytes: expected {expected}, got {layer.float_bytes}")
    return Decision((index,), (bits,), (layer.float_bytes,), (0.0,), (layer.numel * bits,))


def _matches(names: Sequence[str], pattern: str, what: str) -> list[int]:
    """Returns the layers whose names match a pattern of the option `what`."""
    found = [index for index, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise MpqError(f"{what} {pattern}: matches none of the {len(names)} layers, such as {names[0]}")
    return found


def _groups(layers: Sequence[LayerSensitivity], tie: Sequence[str]) -> list[int]:
    """Returns for each layer the number of its set; layers in one set share a width (union-find)."""
    parents = list(range(len(layers)))

    def root(index: int) -> int:
        while parents[index] != index:
            index = parents[index]
        return index

    first: dict[tuple[str, ...], int] = {}
    names = [layer.name for layer in layers]
    keys: list[tuple[int, tuple[str, ...]]] = [
        (index, ("group", layer.group)) for index, layer in enumerate(layers) if layer.group is not None
    ]
    for pattern in tie:
        expression = _with_groups(pattern, names)
        for index in _matches(names, pattern, "tie"):
            match = expression.fullmatch(names[index])
            assert match is not None, "fnmatch and its groups agree"
            keys.append((index, ("tie", pattern, *match.groups())))
    for index, key in keys:
        other = first.setdefault(key, index)
        parents[max(root(index), root(other))] = min(root(index), root(other))
    return [root(index) for index in range(len(layers))]


def _with_groups(pattern: str, names: Sequence[str]) -> re.Pattern[str]:
    """Returns a regular expression that matches those of the names that fnmatch does, with a group for each *.

    Every other part of a pattern stands for one character; fnmatch itself says which characters of the names fit it.
    """
    alphabet = sorted(set("".join(names)))
    expression = ""
    for part in re.findall(r"\*|\[!?+\]?+[^\]]*\]|.", pattern, re.DOTALL):
        fitting = (re.escape(character) for character in alphabet if fnmatch.fnmatchcase(character, part))
        expression += "(.*)" if part == "*" else f"(?:{'|'.join(fitting)})"
    return re.compile(expression, re.DOTALL)
