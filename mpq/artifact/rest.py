"""Biases, norms and statistics <-> few bytes: whole numbers of steps, entropy-coded.

docs/artifact-format.md describes the bytes.

Each tensor has one step, a fraction of the root mean square of its values, so that all of them are kept to the same
relative precision. A tensor whose values are far from zero, as the weights of a norm are, is coded around its mean.
Tensors with the same number of values, which in a stack of blocks are alike, are the rows of one matrix, so that what
says how they are coded is shared. Zeros, and ones, take no bytes (`mpq.models.folding` makes many).

Legend: R tensors of a matrix, K values in each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mpq.artifact.weights import Cursor
from mpq.coding.compression import compressed, decompressed
from mpq.coding.entropy import Coded, decode, encode
from mpq.errors import MpqError

PRECISION = 8
"""Steps in the root mean square of a tensor, as a power of two; tests/bench_rest.py has what others cost."""

_CODED_BITS = 6
"""The precision that is entropy-coded; the bits below are as good as random, and too many for the coder's tables."""
_ROOTS = np.array([2**23, 9975792, 11863283, 14107901], dtype=np.float32) / np.float32(2**23)
"""2^0, 2^(1/4), 2^(2/4) and 2^(3/4), as float32."""
_EXPONENTS = (-4 * 126, 4 * 127)
"""The least and the greatest exponent of a step 2^(exponent / 4): those of normal float32 numbers."""
_LARGEST_CODE = 1 << 24
"""A float32 has all whole numbers up to this."""
_ZEROS, _ONES, _CODED = range(3)
"""What a tensor is."""


def encode_rest(state: Mapping[str, Tensor], names: Sequence[str], precision: int = PRECISION) -> bytes:
    """Returns the bytes of some tensors; the same tensors always have the same.

    Args:
        state: {name: tensor}, of any shape.
        names: The tensors to store; the reader has to know them, and their shapes, in this order.
        precision: The step is 2^-precision of a tensor's root mean square, rounded to a quarter of an octave.

    Raises:
        MpqError: A value is NaN or infinite, or too far from the others of its tensor.
    """
    if not names:
        return b""
    values = {name: state[name].detach().cpu().double().flatten().numpy() for name in names}
    kinds = {name: _kind(one) for name, one in values.items()}
    raw = max(precision - _CODED_BITS, 0)
    centres, matrices, bits = [], [], []
    for rows in _matrices(kinds, {name: len(one) for name, one in values.items()}):
        found = [_coded(name, values[name], precision) for name in rows]
        codes = np.stack([one[0] for one in found])
        matrices.append(_matrix(codes >> raw, [one[2] for one in found]))
        centres += [one[1] for one in found]
        bits.append(codes.reshape(-1, 1) >> np.arange(raw) & 1)
    packed = compressed(bytes(kinds.values()))
    head = bytes([raw]) + len(packed).to_bytes(4, "little") + packed
    if not matrices:
        return head
    payloads = encode([_matrix(np.array([centres]), [0]), *matrices])
    lengths = np.array([len(payload) for payload in payloads], dtype="<u4")
    return head + lengths.tobytes() + b"".join(payloads) + np.packbits(np.concatenate(bits).astype(np.uint8)).tobytes()


def decode_rest(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Returns the float32 tensors that `encode_rest` stored, bit for bit the same on every machine.

    Args:
        data: What `encode_rest` returned.
        shapes: {name: shape} of the tensors, in the same order.

    Raises:
        MpqError: The bytes are damaged, or those of other tensors.
    """
    cursor = Cursor(data)
    kinds, raw = _read_head(cursor, list(shapes)) if shapes else ({}, 0)
    found = {name: torch.full(shape, float(kinds[name] == _ONES)) for name, shape in shapes.items()}
    matrices = _matrices(kinds, {name: math.prod(shape) for name, shape in shapes.items()})
    if matrices:
        sizes = [(1, sum(map(len, matrices))), *((len(rows), math.prod(shapes[rows[0]])) for rows in matrices)]
        lengths = np.frombuffer(cursor.take(4 * len(sizes)), dtype="<u4").tolist()
        centres, *coded = decode([cursor.take(length) for length in lengths], sizes)
        low = _read_bits(cursor, sum(one.codes.size for one in coded), raw)
        centre = iter(centres.codes[0].tolist())
        for rows, one in zip(matrices, coded, strict=True):
            codes = (one.codes.astype(np.int64) << raw) + low[: one.codes.size].reshape(one.codes.shape)
            low = low[one.codes.size :]
            values = _values(codes + np.array([[next(centre)] for _ in rows]), one.row_exponents)
            found |= {name: torch.from_numpy(row).reshape(shapes[name]) for name, row in zip(rows, values, strict=True)}
    if cursor.position != len(data):
        raise MpqError(f"the rest: expected {cursor.position} bytes, got {len(data)}: the file is damaged")
    return found


def _read_head(cursor: Cursor, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Returns what each tensor is, and how many bits of each code are stored as they are."""
    raw, size = cursor.take(1)[0], int.from_bytes(cursor.take(4), "little")
    kinds = decompressed(cursor.take(size), len(names))
    if len(kinds) != len(names) or max(kinds) > _CODED or raw > 24:
        raise MpqError(f"the rest: expected the kinds of {len(names)} tensors, got {kinds[:20]!r}: the file is damaged")
    return dict(zip(names, kinds, strict=True)), raw


def _read_bits(cursor: Cursor, count: int, raw: int) -> np.ndarray:
    """Returns (count,) numbers of `raw` bits each, the lowest bit first."""
    stored = np.frombuffer(cursor.take(-(-count * raw // 8)), dtype=np.uint8)
    bits = np.unpackbits(stored, count=count * raw).reshape(count, raw)
    numbers: np.ndarray = (bits.astype(np.int64) << np.arange(raw)).sum(axis=1)
    return numbers


def _kind(values: np.ndarray) -> int:
    return _ZEROS if not values.any() else _ONES if (values == 1).all() else _CODED


def _matrices(kinds: Mapping[str, int], sizes: Mapping[str, int]) -> list[list[str]]:
    """Returns the names of the tensors of each matrix: those of one size, in order; constant ones are in none."""
    names = [name for name, kind in kinds.items() if kind == _CODED and sizes[name]]
    return [[name for name in names if sizes[name] == size] for size in dict.fromkeys(sizes[name] for name in names)]


def _coded(name: str, values: np.ndarray, precision: int) -> tuple[np.ndarray, int, int]:
    """Returns (K,) codes less their centre, the centre, and the exponent of the step, of (K,) float64 values."""
    if not np.isfinite(values).all():
        raise MpqError(f"{name}: expected numbers, got NaN or infinity; such a model cannot be stored")
    largest = np.abs(values).max()
    rms = largest * math.sqrt(np.square(values / largest).mean())
    exponent = min(max(round(4 * math.log2(rms)) - 4 * precision, _EXPONENTS[0]), _EXPONENTS[1])
    codes = np.rint(values / float(_steps([exponent])[0]))
    mean = codes.mean()
    centre = int(np.rint(mean)) if abs(mean) > codes.std() else 0
    if np.abs(codes).max() > _LARGEST_CODE // 2:
        raise MpqError(
            f"{name}: expected values of at most 2^23 steps, got {largest:g} where the root mean square is {rms:g}; "
            "such a model cannot be stored"
        )
    if not np.isfinite(_values(codes[None], [exponent])).all():
        raise MpqError(f"{name}: expected values that float32 holds when rounded, got {largest:g}")
    return (codes - centre).astype(np.int32), centre, exponent


def _matrix(codes: np.ndarray, exponents: Sequence[int]) -> Coded:
    columns = np.zeros(codes.shape[1], dtype=np.int16)
    return Coded(codes.astype(np.int32), np.array(exponents, dtype=np.int16), columns)


def _values(codes: np.ndarray, exponents: Iterable[int] | np.ndarray) -> np.ndarray:
    """Returns (R, K) float32 values: codes x steps, one multiplication each."""
    if np.abs(codes).max(initial=0) > _LARGEST_CODE:
        raise MpqError("the rest: a code is beyond 2^24: the file is damaged")
    with np.errstate(over="ignore"):
        values: np.ndarray = codes.astype(np.float32) * _steps(exponents)[:, None]
    return values


def _steps(exponents: Iterable[int] | np.ndarray) -> np.ndarray:
    """Returns the float32 steps 2^(exponent / 4)."""
    whole = np.array(list(exponents), dtype=np.int64)
    if not ((whole >= _EXPONENTS[0]) & (whole <= _EXPONENTS[1])).all():
        raise MpqError(f"the rest: expected steps of 2^-126 to 2^127, got exponents {whole}: the file is damaged")
    steps: np.ndarray = np.ldexp(_ROOTS[whole % 4], whole // 4)
    return steps
