"""Payloads of weights: there and back, as a plain decoder reads them, their size, their exact bytes, and damage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_rans import SCALES, scalar_decode

from mpq.coding.entropy import Coded, decode, encode
from mpq.errors import MpqError

SIZES = [(1, 1), (1, 300), (300, 1), (3, 5), (176, 31), (90, 200)]


def draw(shape: tuple[int, int], std: float, seed: int = 0, outliers: int = 0) -> Coded:
    """Returns Laplacian codes whose rows and columns differ in size, with steps that say so in part."""
    random = np.random.default_rng(seed)
    rows, columns = (np.rint(random.normal(0, 3, count)).astype(np.int16) for count in shape)
    own = random.normal(0, 1, shape[0])[:, None] + random.normal(0, 1, shape[1])
    codes = np.rint(random.laplace(0, std, shape) * 2 ** ((own - rows[:, None] - columns) / 4)).astype(np.int32)
    for _ in range(outliers):
        codes.reshape(-1)[random.integers(codes.size)] = random.integers(-(2**24), 2**24 + 1)
    return Coded(codes, rows, columns)


def same(a: Coded, b: Coded) -> bool:
    """Says whether two weights are the same to the last number."""
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("codes", "row_exponents", "column_exponents")
    )


def test_there_and_back_all_together() -> None:
    weights = [draw(shape, std, seed, seed % 3) for seed, shape in enumerate(SIZES) for std in (0.02, 0.5, 3.0, 400.0)]
    payloads = encode(weights)
    assert payloads == [encode([weight])[0] for weight in weights]  # a payload does not depend on its neighbours
    found = decode(payloads, [weight.codes.shape for weight in weights])
    assert all(same(a, b) for a, b in zip(weights, found, strict=True))
    assert all(one.codes.dtype == np.int32 and one.row_exponents.dtype == np.int16 for one in found)
    assert encode([]) == [] and decode([], []) == []


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_any_codes(height: int, width: int, data: st.DataObject) -> None:
    def some(count: int, most: int) -> list[int]:
        small = st.integers(-2, 2) | st.integers(-most, most)
        return data.draw(st.lists(small, min_size=count, max_size=count))

    codes = np.array(some(height * width, 2**24), dtype=np.int32).reshape(height, width)
    rows, columns = (np.array(some(count, 2**15 - 1), dtype=np.int16) for count in (height, width))
    weight = Coded(codes, rows, columns)
    payloads = encode([weight])
    assert same(decode(payloads, [(height, width)])[0], weight)
    assert same(plain(payloads[0], (height, width)), weight)


def plain(payload: bytes, shape: tuple[int, int]) -> Coded:
    """Returns the weight as docs/artifact-format.md says, in plain Python."""
    first, *_ = payload
    position, described, contexts = 1, [], []
    for count in [*shape, *shape][: 2 if first == 255 else 4]:
        predictor, coded = divmod(payload[position], 64)
        origin = 0
        if predictor in (1, 3):
            origin = int.from_bytes(payload[position + 1 : position + 2], "little", signed=True)
            position += 1
        position += 1
        described.append((predictor, origin, count))
        contexts += [SCALES + coded if coded else 0] * count  # shape 1: table 1 + SCALES + (coded - 1)
    residuals, rest = scalar_decode(payload[position:], contexts)
    vectors: list[list[int]] = []
    for predictor, origin, count in described:
        vector: list[int] = []
        for i in range(count):
            before = vector[i - 1] if i else 0
            exponent = vectors[len(vectors) - 2][i] if len(vectors) >= 2 else 0
            vector.append(residuals.pop(0) + (0, origin, before, origin - exponent)[predictor])
        vectors.append(vector)
    codes = [0] * (shape[0] * shape[1])
    if first != 255:
        scales = [min(max(r + c, 0), SCALES - 1) for r in vectors[2] for c in vectors[3]]
        codes, rest = scalar_decode(rest, [1 + SCALES * first + scale for scale in scales])
    assert not rest.strip(b"\0")
    return Coded(np.array(codes, dtype=np.int32).reshape(shape), *(np.array(v, dtype=np.int16) for v in vectors[:2]))


def test_a_plain_decoder_reads_it() -> None:
    for shape in SIZES:
        weight = draw(shape, 1.0, outliers=2)
        assert same(plain(encode([weight])[0], shape), weight)


def test_the_exact_bytes() -> None:
    """Pins the format, and the choice of tables. The plain decoder above reads them, too."""
    weight = Coded(
        np.array([[0, 1, -2, 0], [3, 0, 0, -1], [0, 0, 500, 0]], dtype=np.int32),
        np.array([0, 0, 0], dtype=np.int16),
        np.array([1, -1, 2, 0], dtype=np.int16),
    )
    (payload,) = encode([weight])
    assert same(decode([payload], [(3, 4)])[0], weight) and same(plain(payload, (3, 4)), weight)
    assert payload.hex() == "0000131f21aa20040034ef573bcfb322008176adc75e1bc0"


def test_the_size_is_near_the_information_of_laplacian_codes() -> None:
    """0.5 % above the information of codes under the very distribution that they were drawn from, rows told apart."""
    random = np.random.default_rng(0)
    weights, information = [], 0.0
    for std in (0.6, 1.5, 6.0):
        spread = 2.0 ** (random.integers(-2, 3, 600)[:, None] / 4 + random.integers(-2, 3, 900) / 4) * std / 2**0.5
        codes = np.rint(random.laplace(0, spread)).astype(np.int32)
        above = np.exp(-(np.abs(codes) + 0.5) / spread)
        below = np.exp(-(np.abs(codes) - 0.5) / spread)
        information -= float(np.log2(np.where(codes == 0, 1 - above, (below - above) / 2)).sum()) / 8
        weights.append(Coded(codes, np.zeros(600, dtype=np.int16), np.zeros(900, dtype=np.int16)))
    assert information < sum(map(len, encode(weights))) < 1.005 * information


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (2000, 3000), (0, 4), (3, 0)])
def test_zeros_take_no_more_than_a_few_bytes(shape: tuple[int, int]) -> None:
    weight = Coded(*(np.zeros(size, dtype=np.int32) for size in (shape, shape[0], shape[1])))
    (payload,) = encode([weight])
    assert len(payload) <= 7
    assert same(decode([payload], [shape])[0], weight)


def test_one_code_of_each_kind_is_short() -> None:
    weights = [Coded(np.array([[q]], dtype=np.int32), *np.zeros((2, 1), dtype=np.int16)) for q in (1, -1, 9, 2**24)]
    assert max(map(len, encode(weights))) <= 17


@given(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 40))
def test_damage_ends_in_an_error_or_another_weight(place: int, change: int, missing: int) -> None:
    weight = draw((9, 14), 2.0, outliers=2)
    (payload,) = encode([weight])
    damaged = bytearray(payload)
    damaged[place % len(payload)] ^= change
    for data in (bytes(damaged), payload[: max(len(payload) - 1 - missing, 0)], bytes(damaged) + payload[:missing]):
        try:
            (found,) = decode([data], [(9, 14)])
        except MpqError:
            continue
        assert found.codes.shape == (9, 14) and np.abs(found.codes).max() <= 2**24


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for shape in ((1, 1), (3, 4), (300, 40)):
        try:
            (found,) = decode([data], [shape])
        except MpqError as error:
            assert "damaged: expected" in str(error)
            continue
        assert found.codes.shape == shape
