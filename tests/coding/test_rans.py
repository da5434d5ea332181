"""The lockstep coder against a plain decoder, for streams of all sizes together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_rans import read_words, shipped_tables

from mpq.coding import rans
from mpq.coding.code_tables import code_tables
from mpq.errors import MpqError

COUNTS = [0, 1, 2, 5000, rans.LANE, rans.LANE + 1, 0, 40000, 3]


def streams(counts: list[int]) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Returns tables drawn at random, symbols drawn by their frequencies, and tails."""
    random = np.random.default_rng(0)
    slots = code_tables().slots(np.arange(len(code_tables().first)))
    contexts = [random.integers(0, len(slots), count).astype(np.uint16) for count in counts]
    symbols = [slots[context, random.integers(0, 1 << 14, len(context))] for context in contexts]
    tails = [random.integers(0, 1 << 16, rans.lanes(count)).astype(np.uint16) for count in counts]
    return contexts, symbols, tails


def test_lanes_by_hand() -> None:
    """They are part of the format."""
    assert [rans.lanes(count) for count in (0, 1, 16384, 16385, 32769)] == [0, 1, 1, 2, 3]


def test_all_sizes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, symbols, tails = streams(COUNTS)
    coded = rans.encode(symbols, tails, code_tables())
    assert coded == [rans.encode([s], [t], code_tables())[0] for s, t in zip(symbols, tails, strict=True)]
    for at_once in (1 << 23, 30000, 1):
        monkeypatch.setattr(rans, "_AT_ONCE", at_once)
        found = rans.decode([one + b"more" for one in coded], contexts, code_tables())
        for one, symbol, tail, (got, ends, size) in zip(coded, symbols, tails, found, strict=True):
            assert (got == symbol).all() and (ends == tail).all() and size == len(one)


@pytest.mark.parametrize("count", [1, rans.LANE + 1, 40000])
def test_a_plain_decoder_reads_it(count: int) -> None:
    (context,), (symbols,), (tail,) = streams([count])
    (data,) = rans.encode([symbols], [tail], code_tables())
    tables, lanes = shipped_tables(), len(tail)
    states, position = np.frombuffer(data, "<u4", lanes).tolist(), 4 * lanes
    for i, table in enumerate(context.tolist()):
        place = int(symbols[i] - code_tables().first[table])
        below, frequency = sum(tables[table][1][:place]), tables[table][1][place]
        lane = i % lanes
        slot = states[lane] % 2**14
        assert below <= slot < below + frequency
        states[lane] = frequency * (states[lane] >> 14) + slot - below
        if lane == lanes - 1 or i == count - 1:
            position = read_words(states, lanes, data, position)
    assert [state - 2**16 for state in states] == tail.tolist() and position == len(data)


def test_the_size_is_that_of_the_frequencies() -> None:
    """Beyond the symbols' information there are 2 bytes of tail and 2 more at most a lane."""
    _, symbols, tails = streams([100_000])
    information = float((14 - np.log2(code_tables().frequency[symbols[0]])).sum()) / 8
    size = len(rans.encode(symbols, tails, code_tables())[0])
    assert information + 2 * len(tails[0]) < size < information + 4 * len(tails[0]) + 1


@given(st.binary(max_size=60), st.integers(0, 30))
def test_any_bytes_are_read_or_refused(data: bytes, count: int) -> None:
    contexts, _, _ = streams([count, 100])
    try:
        (symbols, tails, size), _ = rans.decode([data, bytes(200)], contexts, code_tables())
    except MpqError:
        return
    assert len(symbols) == count and len(tails) == rans.lanes(count) and size <= len(data)


def test_bytes_that_end_early() -> None:
    contexts, symbols, tails = streams([5000])
    (data,) = rans.encode(symbols, tails, code_tables())
    for size in (0, 3, len(data) // 2, len(data) - 2):
        with pytest.raises(MpqError, match="expected more bytes"):
            rans.decode([data[:size]], contexts, code_tables())
