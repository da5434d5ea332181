"""The vectors that say how a weight is coded, and how they are coded themselves: as differences to a prediction.

A weight has four: the exponents of its rows' and columns' steps, and the scales of its rows' and columns' code tables.
A vector is described by a byte, predictor << 6 | table, and for the predictors ORIGIN and EXPONENTS by a second one,
the origin (-128 to 127). Its numbers less their predictions are coded by one table: `table` is 0 for the table CERTAIN
(all of them are 0), and else 1 + the scale of a table of the shape SHAPE. So a vector of zeros is one zero byte.

Legend: n numbers.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from mpq.coding.code_tables import CERTAIN, MAGNITUDES, SCALES, UNIT, code_tables, table
from mpq.errors import MpqError

ZERO, ORIGIN, PREVIOUS, EXPONENTS = range(4)
"""What a number is predicted to be: 0; the origin; the number before it (0 for the first); the origin less the exponent
of the step of its row or column."""
SHAPE = 1
"""The shape of the tables (`code_tables.SHAPES`): Laplace's distribution."""


@dataclass(frozen=True)
class Description:
    """How a vector is predicted and coded.

    Attributes:
        predictor: ZERO, ORIGIN, PREVIOUS or EXPONENTS.
        scale: Of the code table; None for CERTAIN.
        origin: What ORIGIN and EXPONENTS start from.
    """

    predictor: int
    scale: int | None = None
    origin: int = 0

    @property
    def has_origin(self) -> bool:
        """Whether the origin is stored."""
        return self.predictor in (ORIGIN, EXPONENTS)

    @property
    def table(self) -> int:
        """The code table of the residuals."""
        return CERTAIN if self.scale is None else int(table(SHAPE, self.scale))

    def to_bytes(self) -> bytes:
        """Returns one or two bytes."""
        data = bytes([self.predictor << 6 | (0 if self.scale is None else 1 + self.scale)])
        return data + self.origin.to_bytes(1, "little", signed=True) if self.has_origin else data

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple["Description", int]:
        """Returns what the first bytes describe, and how many they are.

        Raises:
            MpqError: The bytes end, or there is no such table.
        """
        if not data or data[0] & 63 > SCALES:
            raise MpqError("a weight's codes are damaged: expected the description of a vector")
        found = cls(data[0] >> 6, (data[0] & 63) - 1 if data[0] & 63 else None)
        if not found.has_origin:
            return found, 1
        if len(data) < 2:
            raise MpqError("a weight's codes are damaged: expected the origin of a vector")
        return cls(found.predictor, found.scale, int.from_bytes(data[1:2], "little", signed=True)), 2

    def residuals(self, numbers: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Returns the (n,) numbers less their predictions."""
        if self.predictor == PREVIOUS:
            return np.diff(numbers, prepend=0)
        return numbers - self.origin + (exponents if self.predictor == EXPONENTS else 0)

    def numbers(self, residuals: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Returns the (n,) numbers that have these residuals."""
        if self.predictor == PREVIOUS:
            return np.cumsum(residuals)
        return residuals + self.origin - (exponents if self.predictor == EXPONENTS else 0)


def describe(numbers: np.ndarray, exponents: np.ndarray) -> tuple[Description, int]:
    """Returns the shortest way to code a vector, and its length in units of 1 / code_tables.UNIT bit.

    Args:
        numbers: (n,) whole numbers.
        exponents: (n,) the exponents of the steps of the same rows or columns; for those themselves zeros.
    """
    found = []
    for predictor in (ZERO, ORIGIN, PREVIOUS, EXPONENTS):
        residuals = Description(predictor).residuals(numbers, exponents)
        origin = 0
        if predictor in (ORIGIN, EXPONENTS) and residuals.size:
            origin = int(np.clip(np.sort(residuals)[len(residuals) // 2], -128, 127))
        magnitudes = np.minimum(np.abs(residuals - origin), MAGNITUDES - 1)
        scale, length = None, 0
        if magnitudes.any():
            totals = lengths() @ np.bincount(magnitudes, minlength=MAGNITUDES)
            scale = int(totals.argmin())
            length = int(totals[scale])
        description = Description(predictor, scale, origin)
        found.append((length + 8 * UNIT * len(description.to_bytes()), description))
    length, description = min(found, key=lambda pair: pair[0])
    return description, length


@cache
def lengths() -> np.ndarray:
    """Returns (SCALES, MAGNITUDES) code lengths of residuals, in units of 1 / UNIT bit."""
    found: np.ndarray = code_tables().lengths()[table(SHAPE, np.arange(SCALES))]
    return found.astype(np.int64)
