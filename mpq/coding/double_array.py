"""The double array of a trie <-> few bytes: the trie itself, and where its nodes lie.

SentencePiece keeps its table of characters as a trie in the double array of Darts-clone (include/darts.h in
github.com/s-yata/darts-clone): a row of 32-bit units. The bits 0 to 7 of a unit are the label on the edge that leads to
it; bit 8 says that its node has a value; bits 10 to 30 are an offset, or, if bit 9 is 1, an offset without its last 8
bits. The *base* of a node is its unit's index xor the offset. Its child of label c has the unit of the index base xor
c; its value is that of the unit `base`, whose bit 31 is 1. Several units may share one node.

To a compressor the offsets look like noise. Walked in depth, the trie has short runs of labels, bases that lie close
together and values that do: it takes a third of the bytes.

Legend: B bytes.
"""

from collections.abc import Sequence

import numpy as np

from mpq.errors import MpqError

_KNOWN, _BARE, _VALUED = range(3)
"""What a unit leads to: a node that came before; a new one without a value; a new one with a value."""
_STREAMS = ("kinds", "counts", "labels", "bases", "known", "values", "unused")
"""The streams hold these numbers: of each unit its kind; of each new node the number of its children, their labels, its
base less that of the node before, and its value less that of the one before; of each unit that leads to a known node
the node's number less that of the one before; of each unit that is not in the trie its bits."""
_WIDTHS = (1, 1, 1, 3, 3, 3, 4)
"""B of the numbers in each stream."""


def to_streams(array: bytes) -> bytes | None:
    """Returns bytes that are far easier to compress than a double array; None where it is no such array."""
    units = np.frombuffer(array[: len(array) // 4 * 4], dtype="<u4").tolist()
    children: dict[int, list[int]] = {}
    for index, unit in enumerate(units):
        if not unit >> 31 and unit & 255:
            children.setdefault(index ^ unit & 255, []).append(unit & 255)
    found: dict[str, list[int]] = {name: [] for name in _STREAMS}
    nodes: dict[int, int] = {}  # {base: number}
    walked, stack = set(), [0] if units else []
    while stack:
        index = stack.pop()
        walked.add(index)
        base = index ^ _offset(units[index])
        if base in nodes:
            found["kinds"].append(_KNOWN)
            found["known"].append(nodes[base])
            continue
        nodes[base] = len(nodes)
        has_value = units[index] >> 8 & 1
        found["kinds"].append(_VALUED if has_value else _BARE)
        if has_value:
            if base >= len(units):
                return None
            walked.add(base)
            found["values"].append(units[base] & 0x7FFFFFFF)
        labels = sorted(children.get(base, []))
        found["counts"].append(len(labels))
        found["labels"] += labels
        stack += [base ^ label for label in reversed(labels)]
    found["bases"] = list(nodes)
    found["unused"] = [unit for index, unit in enumerate(units) if index not in walked]
    for name in ("bases", "known", "values"):
        found[name] = _differences(found[name])
        if max(found[name], default=0) >> 24:
            return None
    sizes = np.array([len(units), *(len(found[name]) for name in _STREAMS)], dtype="<u4").tobytes()
    data = sizes + b"".join(_planes(found[name], width) for name, width in zip(_STREAMS, _WIDTHS, strict=True))
    return data if _is_whole(data, array) else None


def _is_whole(data: bytes, array: bytes) -> bool:
    try:
        return from_streams(data) == array
    except MpqError:
        return False


def from_streams(data: bytes) -> bytes:
    """Returns the double array from what `to_streams` returned.

    Raises:
        MpqError: The bytes are damaged.
    """
    try:
        return _array(data)
    except (IndexError, StopIteration, ValueError, OverflowError):
        raise MpqError("the table of the tokenizer is damaged") from None


def _array(data: bytes) -> bytes:
    length, *counts = np.frombuffer(data[:32], dtype="<u4").tolist()
    ends = 32 + np.cumsum([count * width for count, width in zip(counts, _WIDTHS, strict=True)])
    if len(data) != ends[-1] or length > sum(counts[index] for index in (0, 5, 6)):  # units and values, and the unused
        raise ValueError
    parts = [data[end - count * width : end] for end, count, width in zip(ends, counts, _WIDTHS, strict=True)]
    read = dict(zip(_STREAMS, map(_numbers, parts, _WIDTHS), strict=True))
    bases, values = _sums(read["bases"]), iter(_sums(read["values"]))
    known, sizes, labels = iter(_sums(read["known"])), iter(read["counts"]), iter(read["labels"])
    units: list[int | None] = [None] * length
    nodes = 0
    has_value: list[int] = []
    stack = [(0, 0)] if length else []  # index and label
    for kind in read["kinds"]:
        index, label = stack.pop()
        if kind == _KNOWN:
            base, valued = bases[at := next(known)], has_value[at]
        else:
            base, valued = bases[nodes], int(kind == _VALUED)
            nodes += 1
            has_value.append(valued)
            if valued:
                units[base] = 1 << 31 | next(values)
            own = [next(labels) for _ in range(next(sizes))]
            stack += [(base ^ one, one) for one in reversed(own)]
        offset = base ^ index
        units[index] = label | valued << 8 | (offset << 10 if offset < 1 << 21 else offset << 2 | 1 << 9)
    unused = iter(read["unused"])
    return np.array([next(unused) if unit is None else unit for unit in units], dtype="<u4").tobytes()


def _offset(unit: int) -> int:
    return unit >> 10 << (8 if unit >> 9 & 1 else 0)


def _differences(numbers: Sequence[int]) -> list[int]:
    """Returns each number less the one before it, 2d if that is not negative and -2d - 1 if it is."""
    differences = np.diff(np.array(numbers, dtype=np.int64), prepend=0)
    found: list[int] = np.where(differences < 0, -2 * differences - 1, 2 * differences).tolist()
    return found


def _sums(numbers: Sequence[int]) -> list[int]:
    """Returns the numbers with these differences."""
    coded = np.array(numbers, dtype=np.int64)
    found: list[int] = np.cumsum(np.where(coded & 1, -(coded + 1) // 2, coded // 2)).tolist()
    if min(found, default=0) < 0:
        raise ValueError
    return found


def _planes(numbers: Sequence[int], width: int) -> bytes:
    """Returns the lowest bytes of all numbers, then the next bytes, and so on."""
    rows = np.array(numbers, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return rows[:, :width].T.tobytes()


def _numbers(data: bytes, width: int) -> list[int]:
    planes = np.frombuffer(data, dtype=np.uint8).reshape(width, -1).astype(np.int64)
    found: list[int] = (planes << 8 * np.arange(width)[:, None]).sum(axis=0).tolist()
    return found
