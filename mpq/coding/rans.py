"""An entropy coder for symbols of known frequencies: interleaved rANS, many streams at once.

A lane is one coder state, a number x of 32 bits. To code a symbol of frequency f (out of 2^14) that has the sum c of
frequencies before it, x becomes floor(x / f) 2^14 + x mod f + c, after its lower 16 bits were put out as a word if it
would not fit otherwise; a decoder finds the symbol from x mod 2^14, undoes the step, and reads a word when x falls
below 2^16 (Duda 2013, arXiv 1311.2540; Giesen 2014, arXiv 1402.3392, for lanes that share one sequence of words). A
stream of n symbols has ceil(n / LANE) lanes: symbol i belongs to lane i mod lanes, and at each step the lanes that
need a word take the next ones of the stream, in their order. The states are stored before the words. A lane begins
(for a decoder: ends) with 2^16 plus a tail: 16 bits of something that a decoder needs only afterwards.

All lanes of many streams are one vector here, so that they share NumPy's overhead for each operation.

Legend: n symbols of a stream, L lanes of all streams, S steps.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from mpq.coding.code_tables import CERTAIN, PRECISION, CodeTables
from mpq.errors import MpqError

LANE = 16384
"""The most symbols of a lane."""
_AT_ONCE = 1 << 23
"""The most symbols, padding included, that are worked on at once, if they are of more than one stream."""
_LEAST = 1 << 16
"""The least state."""


def lanes(count: int) -> int:
    """Returns the lanes of a stream of `count` symbols."""
    return -(-count // LANE)


def encode(streams: Sequence[np.ndarray], tails: Sequence[np.ndarray], tables: CodeTables) -> list[bytes]:
    """Returns the states and words of each stream.

    Args:
        streams: (n,) uint16 symbols of each stream.
        tails: (lanes(n),) 16-bit numbers of each stream.
        tables: What the symbols stand for.
    """
    coded = [b""] * len(streams)
    for group in _groups([len(stream) for stream in streams]):
        widths = np.array([lanes(len(streams[i])) for i in group])
        symbols = np.full((_steps(len(streams[group[0]])), widths.sum()), tables.first[CERTAIN], dtype=np.uint16)
        for i, columns in zip(group, _columns(widths), strict=True):
            _fill(symbols[:, columns], streams[i])
        active = _active([len(streams[i]) for i in group], widths)
        states = _LEAST + np.concatenate([tails[i] for i in group]).astype(np.uint32)
        takers, words = [], []
        for step in reversed(range(len(symbols))):
            now = symbols[step, : active[step]]
            frequency, state = tables.frequency[now], states[: active[step]]
            full = np.flatnonzero(state >> (32 - PRECISION) >= frequency)
            takers.append(full)
            words.append(state[full].astype(np.uint16))
            state[full] >>= 16
            high, low = np.divmod(state, frequency)
            state[:] = (high << PRECISION) + low + tables.cumulative[now]
        owner = np.repeat(np.arange(len(group)), widths)[np.concatenate(takers[::-1])]
        ordered = np.concatenate(words[::-1])[np.argsort(owner, kind="stable")].astype("<u2")
        parts = np.split(ordered, np.cumsum(np.bincount(owner, minlength=len(group)))[:-1])
        for i, columns, part in zip(group, _columns(widths), parts, strict=True):
            coded[i] = states[columns].astype("<u4").tobytes() + part.tobytes()
    return coded


def decode(
    data: Sequence[bytes], contexts: Sequence[np.ndarray], tables: CodeTables
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Returns (n,) symbols, (lanes(n),) tails and the number of bytes read, of each stream.

    Args:
        data: What `encode` returned for each stream, and anything behind it.
        contexts: (n,) the table of each symbol, of each stream.
        tables: The tables.

    Raises:
        MpqError: The bytes of a stream end early.
    """
    nothing = np.zeros(0, dtype=np.uint16)
    decoded = [(nothing, nothing, 0)] * len(data)
    for group in _groups([len(context) for context in contexts]):
        found = _decode_group([data[i] for i in group], [contexts[i] for i in group], tables)
        for i, one in zip(group, found, strict=True):
            decoded[i] = one
    return decoded


def _decode_group(
    data: Sequence[bytes], contexts: Sequence[np.ndarray], tables: CodeTables
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Returns what `decode` does, of streams that are all worked on at once."""
    widths = np.array([lanes(len(context)) for context in contexts])
    supplies = [(len(one) - 4 * int(width)) // 2 for one, width in zip(data, widths, strict=True)]  # words
    if min(supplies) < 0:
        raise MpqError("the codes of a weight are damaged: expected more bytes")
    pairs = list(zip(data, widths.tolist(), strict=True))
    states = np.concatenate([np.frombuffer(one, "<u4", width) for one, width in pairs]).astype(np.uint32)
    words = np.concatenate(
        [
            *(np.frombuffer(one, "<u2", n, 4 * width) for (one, width), n in zip(pairs, supplies, strict=True)),
            np.zeros(1, dtype=np.uint16),
        ]
    ).astype(np.uint32)
    begin = np.cumsum(supplies) - supplies
    position = begin.copy()

    used = np.union1d([CERTAIN], np.concatenate([np.unique(context) for context in contexts]))
    slots = tables.slots(used).reshape(-1)
    local = np.zeros(len(tables.first), dtype=np.uint32)
    local[used] = np.arange(len(used), dtype=np.uint32) << PRECISION
    bases = np.full((_steps(len(contexts[0])), int(widths.sum())), local[CERTAIN])
    for context, columns in zip(contexts, _columns(widths), strict=True):
        _fill(bases[:, columns], local[context])

    symbols = np.empty(bases.shape, dtype=np.uint16)
    owners = np.repeat(np.arange(len(data)), widths)
    ranks = np.arange(len(owners))
    both = tables.frequency << 16 | tables.cumulative
    for step, active in enumerate(_active([len(context) for context in contexts], widths)):
        state, base, symbol = states[:active], bases[step, :active], symbols[step, :active]
        slot = state & ((1 << PRECISION) - 1)
        base += slot
        slots.take(base, out=symbol, mode="clip")  # "clip" writes to `out` without a copy
        pair = both.take(symbol)
        state >>= PRECISION
        state *= pair >> 16
        state += slot
        state -= pair & 0xFFFF
        low = (state < _LEAST).nonzero()[0]
        owner = owners.take(low)
        taken = np.bincount(owner, minlength=len(data))
        place = (position - taken.cumsum() + taken).take(owner)
        place += ranks[: len(low)]
        state[low] = state.take(low) << 16 | words.take(place, mode="clip")  # the end is looked at below
        position += taken
    if (position - begin > supplies).any():
        raise MpqError("the codes of a weight are damaged: expected more bytes")
    ends = 4 * widths + 2 * (position - begin)
    tails = (states - _LEAST).astype(np.uint16)
    return [
        (symbols[:, columns].reshape(-1)[: len(context)], tails[columns], int(end))
        for context, columns, end in zip(contexts, _columns(widths), ends, strict=True)
    ]


def _steps(count: int) -> int:
    """Returns the steps of a stream of `count` symbols."""
    return -(-count // max(lanes(count), 1))


def _groups(counts: Sequence[int]) -> Iterator[list[int]]:
    """Yields the places of streams that are worked on together, those of more steps first; empty ones are left out."""
    group: list[int] = []
    width = 0
    for i in sorted((i for i, count in enumerate(counts) if count), key=lambda i: -_steps(counts[i])):
        if group and (width + lanes(counts[i])) * _steps(counts[group[0]]) > _AT_ONCE:
            yield group
            group, width = [], 0
        group.append(i)
        width += lanes(counts[i])
    if group:
        yield group


def _columns(widths: np.ndarray) -> list[slice]:
    """Returns which columns of a matrix (S, L) are a stream's lanes, for each stream of a group."""
    return [slice(int(end - width), int(end)) for end, width in zip(np.cumsum(widths), widths, strict=True)]


def _fill(columns: np.ndarray, values: np.ndarray) -> None:
    """Writes (n,) values into the columns (S, lanes(n)) of a stream, row by row."""
    whole, rest = divmod(len(values), columns.shape[1])
    columns[:whole] = values[: len(values) - rest].reshape(whole, -1)
    if rest:
        columns[whole, :rest] = values[len(values) - rest :]


def _active(counts: Sequence[int], widths: np.ndarray) -> list[int]:
    """Returns (S,) how many lanes, the first ones, take part in each step."""
    steps = np.array([_steps(count) for count in counts])
    ends = np.append(0, np.cumsum(widths))
    return [int(end) for end in ends[np.searchsorted(-steps, -np.arange(steps[0]), side="left")]]
