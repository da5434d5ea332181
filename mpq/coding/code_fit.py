"""Which code tables make a weight's codes short: a shape for the weight, a scale for each row and each column.

The table of code (i, j) has the scale r_i + c_j: rows and columns differ by factors. The mean magnitudes of rows and
columns say where to start; then each r_i and c_j moves by one where that makes codes and vectors together shorter. All
of it is whole numbers, so that the same codes give the same bytes on any machine.

Measured on NVIDIA's model, rounded by gptq to 1.93 bits a weight, of which the vectors are 0.028: counting them half,
or one and a half times, in the moves makes the total 0.02 or 0.003 % longer; four rounds instead of two make it 0.02 %
shorter; one shape instead of five 0.07 % longer. What is left is noise: magnitudes of neighbours in a row correlate by
0.013, those in a column by 0.002, and blocks of 16 x 16 vary as chance has it.

Legend: C rows, K columns.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from mpq.coding.code_tables import MAGNITUDES, PRECISION, SCALES, SHAPES, code_tables, table
from mpq.coding.vectors import ORIGIN, PREVIOUS, Description, describe, lengths

START = 2
"""The shape that the first scales are those of."""
ROUNDS = 2
"""How often all rows and columns are moved."""


@dataclass(frozen=True)
class Fit:
    """The tables of a weight.

    Attributes:
        shape: An index of `code_tables.SHAPES`.
        rows: (C,) r, whole numbers.
        columns: (K,) c.
    """

    shape: int
    rows: np.ndarray
    columns: np.ndarray

    def tables(self) -> np.ndarray:
        """Returns the (C K,) uint16 tables of the codes, row by row."""
        scales = np.clip(self.rows[:, None] + self.columns, 0, SCALES - 1)
        return np.asarray(table(self.shape, scales)).astype(np.uint16).reshape(-1)


def fit(codes: np.ndarray, row_exponents: np.ndarray, column_exponents: np.ndarray) -> Fit:
    """Returns tables that make the codes short.

    Args:
        codes: (C, K) whole numbers.
        row_exponents: (C,) exponents of the rows' steps, which predict r.
        column_exponents: (K,) those of the columns, which predict c.
    """
    row_exponents, column_exponents = row_exponents.astype(np.int64), column_exponents.astype(np.int64)
    magnitudes = np.minimum(np.abs(codes), MAGNITUDES - 1).astype(np.int32)
    level = _scale(magnitudes.sum(), magnitudes.size)
    rows = _scale(magnitudes.sum(1), codes.shape[1]) - level
    columns = _scale(magnitudes.sum(0), codes.shape[0])
    shape = _best_shape(magnitudes, rows, columns)
    for _ in range(ROUNDS):
        rows = rows + _moves(magnitudes, shape, rows, columns, row_exponents)
        columns = columns + _moves(magnitudes.T, shape, columns, rows, column_exponents)
        shape = _best_shape(magnitudes, rows, columns)
    middle = int(np.sort(rows)[len(rows) // 2])
    return Fit(shape, rows - middle, columns + middle)


def _scale(total: np.ndarray, count: int) -> np.ndarray:
    """Returns the scale at which numbers have a mean magnitude near total / count."""
    means = np.maximum.accumulate(code_tables().means()[table(START, np.arange(SCALES))])
    middles = (means[1:] + means[:-1]) // 2
    found: np.ndarray = np.searchsorted(middles, (np.asarray(total, dtype=np.int64) << PRECISION) // count)
    return found


@cache
def _lengths(shape: int) -> np.ndarray:
    """Returns (SCALES MAGNITUDES,) code lengths of a shape."""
    return np.ascontiguousarray(code_tables().lengths()[table(shape, np.arange(SCALES))].reshape(-1))


def _places(magnitudes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns (C, K) where in `_lengths` the length of each code is."""
    scales = np.clip(rows[:, None] + columns, 0, SCALES - 1).astype(np.int32)
    places: np.ndarray = scales * MAGNITUDES + magnitudes
    return places


def _best_shape(magnitudes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> int:
    """Returns the shape that makes the codes shortest at these scales."""
    places = _places(magnitudes, rows, columns)
    return int(np.argmin([_lengths(shape).take(places).sum() for shape in range(len(SHAPES))]))


def _moves(
    magnitudes: np.ndarray, shape: int, rows: np.ndarray, columns: np.ndarray, exponents: np.ndarray
) -> np.ndarray:
    """Returns (C,) -1, 0 or 1: by how much each row's scale should move."""
    description, _ = describe(rows, exponents)
    if description.predictor == PREVIOUS:  # a move would change two residuals
        description = Description(ORIGIN, description.scale, int(np.sort(rows)[len(rows) // 2]))
    penalty = lengths()[description.scale or 0]
    totals = []
    for move in (0, -1, 1):
        residuals = np.abs(description.residuals(rows + move, exponents))
        places = _places(magnitudes, rows + move, columns)
        totals.append(
            _lengths(shape).take(places).sum(1, dtype=np.int64) + penalty[np.minimum(residuals, MAGNITUDES - 1)]
        )
    best: np.ndarray = np.array([0, -1, 1])[np.argmin(totals, axis=0)]
    return best
