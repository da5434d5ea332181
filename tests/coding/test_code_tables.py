"""The shipped tables against SciPy's generalised Gaussian; MPQ_WRITE_TABLES=1 writes them."""

import os
from pathlib import Path

import numpy as np
from scipy import special

from mpq.coding.code_tables import (
    CERTAIN,
    MAGNITUDES,
    PRECISION,
    SCALES,
    SHAPES,
    UNIT,
    code_tables,
    table,
)

SHIPPED = Path(__file__).resolve().parents[2] / "mpq/coding/code_tables.bin"


def probabilities(shape: float, scale: int, magnitudes: int = 4096) -> np.ndarray:
    """Returns the probabilities of 0, 1, 2, ... (of one sign) of a rounded generalised Gaussian."""
    std = 2.0 ** (scale / 4 - 4)
    width = std * np.exp((special.gammaln(1 / shape) - special.gammaln(3 / shape)) / 2)
    beyond = special.gammaincc(1 / shape, ((np.arange(magnitudes) + 0.5) / width) ** shape)  # P(|x| > k + 1/2)
    return np.append(1 - beyond[0], (beyond[:-1] - beyond[1:]) / 2)


def frequencies(shape: float, scale: int) -> list[int]:
    """Returns what is shipped of a table: the largest magnitude, and the frequencies of 0, 1, ... and of the escape."""
    counts = probabilities(shape, scale) * 2**PRECISION
    last = max(int((counts[: MAGNITUDES - 1] >= LEAST).sum()) - 1, 0)
    kept = np.maximum(np.rint(counts[1 : last + 1]), 1).astype(int).tolist()
    escape = max(round(2 * float(counts[last + 1 :].sum())), 1)
    return [last, 2**PRECISION - 2 * sum(kept) - escape, *kept, escape]


LEAST = 1.0
"""A magnitude has a symbol if its probability is 2^-PRECISION times this."""


def test_the_shipped_tables_are_these() -> None:
    made = np.concatenate([frequencies(shape, scale) for shape in SHAPES for scale in range(SCALES)]).astype("<u2")
    if os.environ.get("MPQ_WRITE_TABLES"):
        SHIPPED.write_bytes(made.tobytes())
    assert SHIPPED.read_bytes() == made.tobytes()


def test_symbols_and_slots_are_inverse() -> None:
    tables = code_tables()
    every = np.arange(len(tables.first))
    for name, row in zip(every, tables.slots(every), strict=True):
        symbols, counts = np.unique(row, return_counts=True)
        assert (counts == tables.frequency[symbols]).all() and (np.diff(row.astype(int)) >= 0).all()
        values = tables.value[symbols]
        values[tables.is_escape[symbols]] = tables.largest[name] + 1
        assert (tables.symbols(values, np.full(len(values), name)) == symbols).all()
        assert (tables.cumulative[symbols] == np.cumsum(counts) - counts).all()


def test_whole_frequencies_lose_less_than_a_thousandth() -> None:
    """The mean length with escapes against the entropy of the exact distribution, where that is above 0.1 bits."""
    lengths = code_tables().lengths() / UNIT
    checked = 0
    for i, shape in enumerate(SHAPES):
        for scale in range(SCALES):
            exact = probabilities(shape, scale)
            both = np.append(exact[0], 2 * exact[1:])
            entropy = -(both[exact > 0] * np.log2(exact[exact > 0])).sum()
            if entropy > 0.1:
                known = lengths[table(i, scale)]
                beyond = np.full(len(both) - MAGNITUDES, known[-1] + 4)  # numbers up to 8 * MAGNITUDES
                mean = float((both * np.append(known, beyond)).sum())
                assert -0.0005 < mean - entropy < max(0.001 * entropy, 0.001), (shape, scale)
                checked += 1
    assert checked > 150


def test_code_lengths_are_the_same_on_any_machine() -> None:
    """No logarithm of a frequency is so close to a border of rounding that a last bit decides."""
    exact = UNIT * np.log2(np.arange(1, 2**PRECISION).astype(np.float64))
    whole = np.rint(exact) == exact  # powers of two
    assert np.abs(exact - np.floor(exact) - 0.5)[~whole].min() > 1e-6


def test_lengths_and_means_by_hand() -> None:
    tables = code_tables()
    assert tables.lengths()[CERTAIN, 0] == 0
    t = int(table(1, 16))  # Laplace, standard deviation 1
    first, largest = tables.first[t], tables.largest[t]
    frequency = tables.frequency[first : first + 2 * largest + 2].astype(float)
    assert tables.lengths()[t, 1] == round(UNIT * (14 - np.log2(frequency[1])))
    escape = 14 - np.log2(frequency[-1]) + 1 + 0 + 1  # a one, no bit behind it, a sign
    assert abs(tables.lengths()[t, largest + 1] - UNIT * escape) < 1
    assert tables.means()[t] == sum(2 * (k + 1) * n for k, n in enumerate(frequency[1:-1:2]))
    assert tables.means()[CERTAIN] == 0
