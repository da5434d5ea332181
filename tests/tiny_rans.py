"""A decoder of coded numbers in plain Python, one after the other, as docs/artifact-format.md says."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

SCALES = 41
LANE = 16384


@cache
def shipped_tables() -> list[tuple[int, list[int]]]:
    """Returns of each table the largest magnitude and the frequencies of 0, 1, -1, 2, -2, ... and the escape."""
    stored = np.fromfile(Path(__file__).resolve().parents[1] / "mpq/coding/code_tables.bin", dtype="<u2").tolist()
    tables = [(0, [1 << 14])]
    while stored:
        last = stored.pop(0)
        zero, *both = stored[: last + 1]
        tables.append((last, [zero, *(count for count in both for _ in range(2)), stored[last + 1]]))
        del stored[: last + 2]
    return tables


def scalar_decode(data: bytes, contexts: Sequence[int]) -> tuple[list[int], bytes]:
    """Returns the numbers that are coded by these tables, and the bytes that follow."""
    if not len(contexts):
        return [], data
    tables = shipped_tables()
    lanes = -(-len(contexts) // LANE)
    states = [int.from_bytes(data[4 * lane : 4 * lane + 4], "little") for lane in range(lanes)]
    position = 4 * lanes
    places = []
    for i, context in enumerate(contexts):
        if i % lanes == 0 and i:
            position = read_words(states, lanes, data, position)
        lane = i % lanes
        slot = states[lane] % 2**14
        place, below = 0, 0
        while below + tables[context][1][place] <= slot:
            below += tables[context][1][place]
            place += 1
        states[lane] = tables[context][1][place] * (states[lane] >> 14) + slot - below
        places.append(place)
    position = read_words(states, lanes, data, position)
    tails = b"".join((state - 2**16).to_bytes(2, "little") for state in states)
    rest = tails + data[position:]
    bits = "".join(f"{byte:08b}" for byte in rest)
    escapes = [i for i, context in enumerate(contexts) if context and places[i] == 2 * tables[context][0] + 1]
    at, zeros = 0, {}
    for i in escapes:
        zeros[i] = bits.index("1", at) - at
        at += zeros[i] + 1
    numbers = [(place + 1) // 2 * (1 if place % 2 else -1) for place in places]
    for i in escapes:
        last, order = tables[contexts[i]][0], max((contexts[i] - 1) % SCALES // 4 - 4, 0)
        high = int("1" + bits[at : at + zeros[i]], 2) - 1
        low = int("0" + bits[at + zeros[i] : at + zeros[i] + order], 2)
        at += zeros[i] + order + 1
        numbers[i] = (last + 1 + high * 2**order + low) * (-1 if bits[at - 1] == "1" else 1)
    return numbers, rest[-(-at // 8) :]


def read_words(states: list[int], lanes: int, data: bytes, position: int) -> int:
    """Gives a word to each lane that needs one; returns the place behind them."""
    for lane in range(lanes):
        if states[lane] < 2**16:
            states[lane] = states[lane] << 16 | int.from_bytes(data[position : position + 2], "little")
            position += 2
    return position
