"""What there is to decide about a model's layers: floors, exclusions and ties turned into options.

A decision is one layer, or several that share one bit-width; its options are the widths that were measured, each with
its bytes in the packed file and its divergence.
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpq.errors import MpqError
from mpq.quantization.spec import FLOAT_BITS, MAX_BITS, MIN_BITS
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable


@dataclass(frozen=True)
class Decision:
    """Layers that share one bit-width.

    Attributes:
        layers: Their indices in the table.
        bits: The widths to choose from.
        size_bytes, kl, code_bits: Sums over the layers, for each of the widths.
    """

    layers: tuple[int, ...]
    bits: tuple[int, ...]
    size_bytes: tuple[int, ...]
    kl: tuple[float, ...]
    code_bits: tuple[int, ...]


def list_decisions(
    table: SensitivityTable, keep: Mapping[str, int], exclude: Sequence[str], tie: Sequence[str]
) -> list[Decision]:
    """Returns what is to be decided: one entry for each layer or set of tied layers, with its allowed widths.

    Args:
        table: The layers.
        keep, exclude, tie: As in `mpq.allocation.solve.allocate`.

    Raises:
        MpqError: A pattern matches nothing or contradicts another, or a layer has no size to be excluded with.
    """
    names = [layer.name for layer in table.layers]
    floors = [0] * len(names)
    for pattern, bits in keep.items():
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise MpqError(f"keep {pattern}={bits}: expected whole bits from {MIN_BITS} to {MAX_BITS}")
        if bits > max(table.bits):
            raise MpqError(f"keep {pattern}={bits}: the widths that were measured end at {max(table.bits)}")
        for index in _matches(names, pattern, "keep"):
            floors[index] = max(floors[index], bits)
    excluded: set[int] = set()
    for pattern in exclude:
        for index in _matches(names, pattern, "exclude"):
            if floors[index]:
                raise MpqError(f"exclude {pattern}: {names[index]} has a floor of {floors[index]} bits from keep")
            if table.layers[index].float_bytes is None:
                raise MpqError(f"exclude {pattern}: {names[index]} has no float_bytes in the sensitivity file")
            excluded.add(index)
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(_groups(table.layers, tie)):
        groups.setdefault(group, []).append(index)
    decisions = []
    for members in groups.values():
        if excluded & set(members):
            if left := [names[index] for index in members if index not in excluded]:
                raise MpqError(f"exclude: {left[0]} is tied to an excluded layer; exclude it too")
            layers = [table.layers[index] for index in members]
            decisions += [_excluded(index, layer) for index, layer in zip(members, layers, strict=True)]
            continue
        floor = max(floors[index] for index in members)
        layers = [table.layers[index] for index in members]
        widths = tuple(bits for bits in table.bits if bits >= floor)
        decisions.append(
            Decision(
                tuple(members),
                widths,
                tuple(sum(layer.size_bytes[bits] for layer in layers) for bits in widths),
                tuple(math.fsum(layer.kl[bits] for layer in layers) for bits in widths),
                tuple(sum(layer.numel * bits for layer in layers) for bits in widths),
            )
        )
    return decisions


def _excluded(index: int, layer: LayerSensitivity) -> Decision:
    assert layer.float_bytes is not None
    bits = 8 * layer.float_bytes // layer.numel
    if bits not in FLOAT_BITS or layer.float_bytes * 8 != bits * layer.numel:
        expected = " or ".join(str(bits * layer.numel // 8) for bits in FLOAT_BITS)
        raise MpqError(f"exclude: {layer.name}: float_bytes: expected {expected}, got {layer.float_bytes}")
    return Decision((index,), (bits,), (layer.float_bytes,), (0.0,), (layer.numel * bits,))


def _matches(names: Sequence[str], pattern: str, what: str) -> list[int]:
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
    keys = [(index, ("group", layer.group)) for index, layer in enumerate(layers) if layer.group is not None]
    for pattern in tie:
        # what each * stands for, in groups of a regular expression
        expression = re.compile("(.*)".join(fnmatch.translate(part)[4:-3] for part in pattern.split("*")))
        for index in _matches(names, pattern, "tie"):
            match = expression.fullmatch(names[index])
            if match is None:
                raise MpqError(f"tie {pattern}: a * within [...] stands for itself, which no layer's name has")
            keys.append((index, ("tie", pattern, *match.groups())))
    for index, key in keys:
        other = first.setdefault(key, index)
        parents[max(root(index), root(other))] = min(root(index), root(other))
    return [root(index) for index in range(len(layers))]
