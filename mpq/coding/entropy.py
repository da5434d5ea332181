"""A weight's whole numbers <-> as few bytes as their distribution allows. docs/artifact-format.md describes the bytes.

The codes of a row or a column are alike in size, so each code has one of a few static distributions, chosen by its row
and its column (`code_fit`, `code_tables`). What says which, and the exponents of the steps, are vectors that are coded
before (`vectors`).

Legend: C rows, K columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpq.coding import numbers
from mpq.coding.code_fit import Fit, fit
from mpq.coding.code_tables import SHAPES
from mpq.coding.vectors import Description, describe
from mpq.errors import MpqError

_ALL_ZERO = 255
"""The first byte of a weight whose codes are all 0; for others it is the shape."""
_NONE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Coded:
    """What is coded of a weight.

    Attributes:
        codes: (C, K) int32 in [-2^24, 2^24].
        row_exponents: (C,) int16: the step of weight (i, j) is scale * 2^((row_i + column_j) / 4).
        column_exponents: (K,) int16.
    """

    codes: np.ndarray
    row_exponents: np.ndarray
    column_exponents: np.ndarray


def encode(weights: Sequence[Coded]) -> list[bytes]:
    """Returns the payload of each weight. It ends by itself, but says nowhere how long it is."""
    heads, vectors, contexts, codes, tables = [], [], [], [], []
    for weight in weights:
        found = fit(weight.codes, weight.row_exponents, weight.column_exponents) if weight.codes.any() else None
        rows, columns = weight.row_exponents.astype(np.int64), weight.column_exponents.astype(np.int64)
        parts = [(rows, 0 * rows), (columns, 0 * columns)]  # numbers, and the exponents that may predict them
        if found:
            parts += [(found.rows, rows), (found.columns, columns)]
        described = [describe(*part)[0] for part in parts]
        first = found.shape if found else _ALL_ZERO
        heads.append(bytes([first]) + b"".join(one.to_bytes() for one in described))
        vectors.append(np.concatenate([one.residuals(*part) for one, part in zip(described, parts, strict=True)]))
        contexts.append(_contexts(described, weight.codes.shape))
        codes.append(weight.codes.reshape(-1) if found else _NONE)
        tables.append(found.tables() if found else _NONE)
    coded = numbers.encode(vectors, contexts, numbers.encode(codes, tables, [b""] * len(codes)))
    return [head + one for head, one in zip(heads, coded, strict=True)]


def decode(payloads: Sequence[bytes], shapes: Sequence[tuple[int, int]]) -> list[Coded]:
    """Returns the weights of some payloads.

    Args:
        payloads: What `encode` returned.
        shapes: (C, K) of each weight.

    Raises:
        MpqError: A payload is damaged.
    """
    heads = [_read_head(payload) for payload in payloads]
    rests = [payload[size:] for payload, (_, size) in zip(payloads, heads, strict=True)]
    contexts = [_contexts(described, shape) for (described, _), shape in zip(heads, shapes, strict=True)]
    vectors, tables = [], []
    for i, (found, rest) in enumerate(numbers.decode(rests, contexts)):
        height, width = shapes[i]
        described, parts = heads[i][0], np.split(found.astype(np.int64), [height, height + width, 2 * height + width])
        rows, columns = described[0].numbers(parts[0], 0 * parts[0]), described[1].numbers(parts[1], 0 * parts[1])
        vectors.append((rows.astype(np.int16), columns.astype(np.int16)))
        tables.append(_NONE)
        if len(described) == 4:
            scales = described[2].numbers(parts[2], rows), described[3].numbers(parts[3], columns)
            tables[i] = Fit(payloads[i][0], *scales).tables()
        rests[i] = rest
    coded = []
    for i, (found, rest) in enumerate(numbers.decode(rests, tables)):
        if rest.strip(b"\0"):
            raise MpqError(f"a weight's codes are damaged: expected {len(rest)} bytes less")
        codes = found.reshape(shapes[i]) if len(tables[i]) else np.zeros(shapes[i], dtype=np.int32)
        coded.append(Coded(codes, *vectors[i]))
    return coded


def _read_head(payload: bytes) -> tuple[list[Description], int]:
    """Returns how a weight's vectors are coded, two if all codes are 0 and else four, and the bytes that say it."""
    if not payload or (payload[0] >= len(SHAPES) and payload[0] != _ALL_ZERO):
        raise MpqError(f"a weight's codes are damaged: expected a shape up to {len(SHAPES) - 1}, got {payload[:1]!r}")
    described, position = [], 1
    for _ in range(2 if payload[0] == _ALL_ZERO else 4):
        one, size = Description.from_bytes(payload[position : position + 2])
        described.append(one)
        position += size
    return described, position


def _contexts(described: Sequence[Description], shape: Sequence[int]) -> np.ndarray:
    """Returns the table of each number of the vectors: row and column exponents, and perhaps row and column scales."""
    counts = [*shape, *shape][: len(described)]
    return np.repeat(np.array([one.table for one in described], dtype=np.uint16), counts)
