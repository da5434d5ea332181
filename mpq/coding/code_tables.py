"""Integer probabilities of codes: the tables that the entropy coder of the packed file looks up.

A table is the distribution of whole numbers that a symmetric generalised Gaussian exp(-|x / a|^shape) gives when it is
rounded, for five shapes and standard deviations a quarter octave apart. Probabilities are whole multiples of 2^-14 and
add up to 1. A number whose probability would be below about 2^-13 has none of its own: it is an *escape*, and its
value is written elsewhere (`mpq.coding.escapes`). So no float takes part in decoding, and nothing depends on a
machine's mathematics: the frequencies are shipped in code_tables.bin (made by tests/coding/test_code_tables.py).

Table 0 is that of a number that is 0 for certain and takes no bits; table 1 + SCALES * shape + scale is that of
SHAPES[shape] and the standard deviation 2^(scale / 4 - 4).

Legend: T tables, S symbols of all tables, A magnitudes.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from mpq.coding.escapes import escape_bits

PRECISION = 14
"""Frequencies of a table add up to 2^PRECISION."""
SHAPES = (0.8, 1.0, 1.3, 1.6, 2.0)
SCALES = 41
MAGNITUDES = 512
"""The magnitudes whose code lengths are known; `mpq.coding.code_fit` takes a larger one for the largest of them."""
UNIT = 1024
"""Code lengths are in units of 1 / UNIT bit."""


@dataclass(frozen=True)
class CodeTables:
    """The tables. All symbols are in one list; those of a table are 0, 1, -1, 2, -2, ... and last the escape.

    Attributes:
        first: (T,) the first symbol of each table.
        largest: (T,) the largest magnitude that is no escape.
        order: (T,) the order of its escapes (`mpq.coding.escapes`).
        frequency: (S,) of each symbol, out of 2^PRECISION.
        cumulative: (S,) the sum of the frequencies before it in its table.
        value: (S,) the number that it stands for; 0 for an escape.
        is_escape: (S,) whether it is an escape.
    """

    first: np.ndarray
    largest: np.ndarray
    order: np.ndarray
    frequency: np.ndarray
    cumulative: np.ndarray
    value: np.ndarray
    is_escape: np.ndarray

    def symbols(self, values: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Returns the (n,) uint16 symbols of (n,) numbers in (n,) tables."""
        magnitude, largest = np.abs(values), self.largest[tables]
        place = np.where(magnitude > largest, 2 * largest + 1, 2 * magnitude - (values > 0))
        symbols: np.ndarray = self.first[tables] + place
        return symbols.astype(np.uint16)

    def slots(self, tables: np.ndarray) -> np.ndarray:
        """Returns the (tables, 2^PRECISION) uint16 symbol that each slot of some tables belongs to."""
        ends = np.append(self.first, len(self.frequency))
        symbols = np.concatenate([np.arange(ends[t], ends[t + 1], dtype=np.uint16) for t in tables])
        return np.repeat(symbols, self.frequency[symbols]).reshape(len(tables), -1)

    def lengths(self) -> np.ndarray:
        """Returns the (T, MAGNITUDES) uint16 code lengths of numbers of each magnitude, sign and escape included.

        They are in units of 1 / UNIT bit. Whether they are rounded up or down does not depend on the machine: no
        logarithm of a frequency lies close to the border (tests/coding/test_code_tables.py).
        """
        magnitude = np.arange(MAGNITUDES)
        exact = np.rint(UNIT * (PRECISION - np.log2(self.frequency.astype(np.float64)))).astype(np.int64)
        largest, first = self.largest[:, None], self.first[:, None]
        excess = np.maximum(magnitude - largest - 1, 0)
        escape = exact[np.minimum(first + 2 * largest + 1, len(exact) - 1)]
        known = exact[first + 2 * np.minimum(magnitude, largest)]
        lengths: np.ndarray = np.where(
            magnitude > largest, escape + UNIT * escape_bits(excess, self.order[:, None]), known
        )
        lengths[CERTAIN, 1:] = np.iinfo(np.uint16).max
        return lengths.astype(np.uint16)

    def means(self) -> np.ndarray:
        """Returns (T,) the mean magnitude of each table's numbers but for the escapes, times 2^PRECISION."""
        weighed = np.append(np.abs(self.value.astype(np.int64)) * self.frequency, 0)
        return np.add.reduceat(weighed, self.first)


CERTAIN = 0
"""The table of a number that is 0 for certain."""


def table(shape: np.ndarray | int, scale: np.ndarray | int) -> np.ndarray | int:
    """Returns the number of the table of a shape's index and a scale."""
    return 1 + SCALES * shape + scale


@cache
def code_tables() -> CodeTables:
    """Returns the tables that are shipped."""
    data = files("mpq.coding").joinpath("code_tables.bin").read_bytes()
    return unfold(np.frombuffer(data, dtype="<u2").astype(np.int64))


def unfold(stored: np.ndarray) -> CodeTables:
    """Returns the tables of a list of frequencies.

    Args:
        stored: For each table but the first: its largest magnitude n, the frequencies of 0, 1, ..., n (those of -1,
            ..., -n are the same), and that of the escape.
    """
    frequencies, largest, position = [np.array([1 << PRECISION])], [0], 0
    while position < len(stored):
        last = int(stored[position])
        counts = stored[position + 1 : position + last + 3]
        frequencies.append(np.concatenate([counts[:1], np.repeat(counts[1:-1], 2), counts[-1:]]))
        largest.append(last)
        position += last + 3
    assert len(frequencies) == 1 + len(SHAPES) * SCALES and all(f.sum() == 1 << PRECISION for f in frequencies)
    sizes = np.array([len(counts) for counts in frequencies])
    place = np.concatenate([np.arange(size) for size in sizes])
    is_escape = place == np.repeat(2 * np.array(largest) + 1, sizes)
    value = np.where(place % 2, (place + 1) // 2, -(place // 2))
    order = np.maximum((np.arange(len(sizes)) - 1) % SCALES // 4 - 4, 0)
    order[CERTAIN] = 0
    return CodeTables(
        first=np.cumsum(sizes) - sizes,
        largest=np.array(largest),
        order=order,
        frequency=np.concatenate(frequencies).astype(np.uint32),
        cumulative=np.concatenate([np.cumsum(counts) - counts for counts in frequencies]).astype(np.uint32),
        value=np.where(is_escape, 0, value).astype(np.int32),
        is_escape=is_escape,
    )
