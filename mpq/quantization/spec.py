"""The options of quantization, without the mathematics (and without torch).

A scheme says which levels there are, a rounding which of them a weight gets. Each is one record in the tables below,
and all that other packages ask about one is there. A new scheme is a record in `SCHEMES`, a child of
`mpq.quantization.levels.Levels` in a module of its own, and its test; a new rounding is a record in `ROUNDINGS`, a
function such as `mpq.quantization.gptq.gptq` in a module of its own, and its test.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mpq.errors import MpqError

MIN_BITS, MAX_BITS = 1, 8
MIN_RATE = 0.1
"""The least nominal rate of a scheme whose codes are entropy-coded, in bits a weight; MAX_BITS is the most."""
RATES = (0.6, 1, 1.4, 1.8, 2.2, 2.6, 3, 3.4, 3.8, 4.4, 5, 6)
"""The rates that are measured unless others are asked for."""
WIDTHS = (2, 3, 4, 5, 6, 8)
"""The bit-widths that are measured unless others are asked for."""
LARGEST_CODE = 2**24
"""The largest code of a grid without clipping; float32 counts up to it."""
FLOAT_BITS = (16, 32)
"""Widths of a layer that is left unquantized: IEEE half and single precision."""

SCALE_DTYPES = ("float16", "float32")

Scales = Literal["learned", "recomputed", "frozen"]
"""The treatment of scales in a training (`mpq.finetuning.fake_quant`)."""
SCALES: tuple[Scales, ...] = ("learned", "recomputed", "frozen")


@dataclass(frozen=True)
class Rounding:
    """A way to choose codes.

    Attributes:
        function: "module:name" of the function that rounds; arguments and result are those of
            `mpq.quantization.grids.nearest`.
        needs_statistics: Whether it looks at the layer's inputs, so that it needs calibration data.
    """

    function: str
    needs_statistics: bool = False


ROUNDINGS = {
    "nearest": Rounding("mpq.quantization.grids:nearest"),
    "gptq": Rounding("mpq.quantization.gptq:gptq", needs_statistics=True),
}


@dataclass(frozen=True)
class Scheme:
    """A kind of levels, and what may be done with them.

    Attributes:
        levels: "module:name" of its mathematics, a child of `mpq.quantization.levels.Levels`.
        codes: Returns the codes of a bit-width, ascending.
        is_entropy_coded: Whether a width is a nominal rate, the codes have no bounds and take as many bytes as an
            entropy coder needs for them (`mpq.coding.entropy`), and steps differ from column to column where
            there are statistics of the layer's inputs.
        has_zero_points: Whether each group has a zero point, which is one of the codes.
        has_centroids: Whether each weight has a table of levels, whose indices are the codes.
        roundings: The names of the roundings that it has; without calibration data the first is the default.
        rounding_with_data: The default rounding where there are calibration data.
        training: The way its weights are trained: "straight_through" (the gradient passes the rounding) needs levels
            that are evenly spaced, "soft_assignment" centroids; None: not at all.
        scales: The treatments that its scales may have in a straight-through training.
        granularity, clip: The defaults of these options.
        only: Whether it has no others.
    """

    levels: str
    codes: Callable[[float], range]
    is_entropy_coded: bool = False
    has_zero_points: bool = False
    has_centroids: bool = False
    roundings: tuple[str, ...] = ("nearest",)
    rounding_with_data: str = "nearest"
    training: Literal["straight_through", "soft_assignment"] | None = None
    scales: tuple[Scales, ...] = ()
    granularity: str = "group:64"
    clip: str = "mse"
    only: bool = False


def signed_codes(bits: float) -> range:
    """Returns the codes that lie evenly around zero; at 1 bit these are the signs, without zero.

    >>> list(signed_codes(3)), list(signed_codes(1))
    ([-3, -2, -1, 0, 1, 2, 3], [-1, 1])
    """
    q_max = max(2 ** (int(bits) - 1) - 1, 1)
    return range(-q_max, q_max + 1, 2 if bits == 1 else 1)


def unsigned_codes(bits: float) -> range:
    """Returns the codes from 0 to 2^bits - 1."""
    return range(2 ** int(bits))


def unclipped_codes(bits: float) -> range:
    """Returns the codes of a grid without clipping, whatever its rate is."""
    return range(-LARGEST_CODE, LARGEST_CODE + 1)


SCHEMES = {
    "symmetric": Scheme(
        "mpq.quantization.uniform:Symmetric",
        signed_codes,
        roundings=("nearest", "gptq"),
        rounding_with_data="gptq",
        training="straight_through",
        scales=SCALES,
    ),
    "asymmetric": Scheme(
        "mpq.quantization.uniform:Asymmetric",
        unsigned_codes,
        has_zero_points=True,
        roundings=("nearest", "gptq"),
        rounding_with_data="gptq",
        training="straight_through",
        scales=SCALES,
    ),
    "mulaw": Scheme("mpq.quantization.mu_law:MuLaw", unsigned_codes, has_centroids=True, training="soft_assignment"),
    "entropy": Scheme(
        "mpq.quantization.unclipped:Unclipped",
        unclipped_codes,
        is_entropy_coded=True,
        roundings=("nearest", "gptq"),
        rounding_with_data="gptq",
        training="straight_through",
        scales=("learned", "frozen"),
        granularity="tensor",
        clip="none",
        only=True,
    ),
}

if TYPE_CHECKING:  # a type checker knows no list of names that is made when the program runs
    SchemeName = str
    RoundingName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]
    RoundingName = Literal[tuple(ROUNDINGS)]


def as_width(number: float) -> float:
    """Returns a width as it is written down: whole numbers without a decimal point.

    >>> as_width(2.0), as_width(2.5)
    (2, 2.5)
    """
    return int(number) if float(number).is_integer() else float(number)


def is_width(number: object, scheme: str) -> bool:
    """Returns whether a number is a width of the scheme: a whole number of bits, or a rate."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    if scheme in SCHEMES and SCHEMES[scheme].is_entropy_coded:
        return MIN_RATE <= number <= MAX_BITS and round(number, 3) == number
    return isinstance(number, int) and MIN_BITS <= number <= MAX_BITS


def widths_of(scheme: str) -> str:
    """Returns the words for the widths of a scheme, for messages."""
    if scheme in SCHEMES and SCHEMES[scheme].is_entropy_coded:
        return f"a rate from {MIN_RATE} to {MAX_BITS} bits a weight, with three decimals at most"
    return f"a whole number from {MIN_BITS} to {MAX_BITS}"


def scheme_and_widths(
    scheme: str | None, bits: Sequence[float] | None, rates: Sequence[float] | None, has_ranges: bool = False
) -> tuple[str, list[float]]:
    """Returns the scheme that goes with widths or rates, and which of these are to be measured.

    Rates, or neither, are those of the scheme "entropy"; widths without a scheme are those of QuantSpec's default.

    Args:
        scheme: The scheme, if one was named.
        bits, rates: The widths, or the rates, that were named.
        has_ranges: Whether a granularity or clip was named, which the scheme "entropy" has not.

    Raises:
        MpqError: Both are given, or rates for a scheme that has widths.
    """
    if bits is not None and rates is not None:
        raise MpqError("bits and rates: expected one of them, got both")
    is_coded = rates is not None or (bits is None and not has_ranges)
    scheme = scheme or ("entropy" if is_coded else QuantSpec.scheme)
    if SCHEMES[scheme].is_entropy_coded:
        return scheme, list(rates or bits or RATES)
    if rates is not None:
        raise MpqError(f"rates: the scheme {scheme} has bit-widths; give bits such as 2,3,4,5,6,8 instead")
    return scheme, list(WIDTHS if bits is None else bits)


@dataclass(frozen=True)
class QuantSpec:
    """The quantizer of one weight tensor. The defaults are the measured best of docs/quantizers.md.

    An empty `granularity` or `clip` stands for the scheme's default.

    A weight of shape (C, ...) is seen as a matrix of C rows (output channels) and K columns (all that one output
    channel reads: input channels times kernel positions).

    Attributes:
        bits: Width of a code, 1 to 8; for a scheme whose codes are entropy-coded the nominal rate, in bits a weight,
            from MIN_RATE to 8, with three decimals at most.
        scheme: A name in `SCHEMES`. "symmetric": levels scale * {-(2^(n-1)-1) ... 2^(n-1)-1}; at 1 bit scale * {-1, 1}.
            "asymmetric": levels scale * ({0 ... 2^n-1} - zero_point) with an integer zero point.
            "mulaw": levels scale * 2^n centroids that lie closer together near zero (mpq.quantization.mu_law).
            "entropy": levels step * {... -1, 0, 1 ...} without end, a step for each weight's row and column
            (mpq.quantization.unclipped, mpq.quantization.steps); granularity "tensor" and clip "none" alone.
        granularity: The weights that share a scale: "tensor", "channel" (a row), or "group:G" (G consecutive columns of
            a row; the last group of a row is shorter when G does not divide K).
        clip: The choice of the range: "none" (all weights inside), "mse" or "mae" (searched for the smallest squared
            or absolute error), "percentile:P" (P in (50, 100], of the sorted weights).
        rounding: A name in `ROUNDINGS`, one of those that the scheme has. "nearest", or "gptq": errors are made up
            for, by the statistics of the layer's inputs (mpq.quantization.gptq).
        scale_dtype: "float16" or "float32": the type that scales are stored in, and so the values that they can take.

    Raises:
        MpqError: An option is none of these; the message names it.
    """

    bits: float
    scheme: str = "asymmetric"
    granularity: str = ""
    clip: str = ""
    rounding: str = "nearest"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        for key, known in (("scheme", SCHEMES), ("rounding", ROUNDINGS), ("scale_dtype", SCALE_DTYPES)):
            if getattr(self, key) not in tuple(known):
                raise MpqError(f"{key}: expected {' or '.join(known)}, got {getattr(self, key)!r}")
        if not is_width(self.bits, self.scheme):
            raise MpqError(f"bits: expected {widths_of(self.scheme)}, got {self.bits!r}")
        object.__setattr__(self, "bits", as_width(self.bits))
        for key in ("granularity", "clip"):
            given, default = getattr(self, key), getattr(self.record, key)
            if not isinstance(given, str):
                raise MpqError(f"{key}: expected a string, got {given!r}")
            if given not in ("", default) and self.record.only:
                raise MpqError(f"{key}: the scheme {self.scheme} has {default} alone, got {given}; leave it out")
            object.__setattr__(self, key, given or default)
        if self.rounding not in self.record.roundings:
            raise MpqError(
                f"rounding: the scheme {self.scheme} has no {self.rounding}; use --rounding "
                + " or ".join(self.record.roundings)
            )
        if self.granularity not in ("tensor", "channel") and not re.fullmatch(r"group:[1-9]\d*", self.granularity):
            raise MpqError(f"granularity: expected tensor, channel or group:G with G >= 1, got {self.granularity!r}")
        if self.clip not in ("none", "mse", "mae") and self.percentile is None:
            raise MpqError(f"clip: expected none, mse, mae or percentile:P with 50 < P <= 100, got {self.clip!r}")

    @property
    def record(self) -> Scheme:
        """The record of the scheme."""
        return SCHEMES[self.scheme]

    @property
    def codes(self) -> range:
        """The codes that a weight may have, ascending.

        >>> QuantSpec(3, "symmetric").codes, QuantSpec(3, "asymmetric").codes
        (range(-3, 4), range(0, 8))
        """
        return self.record.codes(self.bits)

    @property
    def is_sign(self) -> bool:
        """Whether the levels are sign(w) * scale, without zero: 1 bit symmetric (Rastegari et al. 2016)."""
        return self.codes.step == 2

    @property
    def needs_statistics(self) -> bool:
        """Whether the rounding looks at the layer's inputs."""
        return ROUNDINGS[self.rounding].needs_statistics

    @property
    def group_size(self) -> int | None:
        """G of "group:G", None for the other granularities."""
        return int(self.granularity.removeprefix("group:")) if self.granularity.startswith("group:") else None

    @property
    def percentile(self) -> float | None:
        """P of "percentile:P", None for the other clips."""
        match = re.fullmatch(r"percentile:(\d+(?:\.\d*)?)", self.clip)
        value = float(match[1]) if match else math.nan
        return value if 50 < value <= 100 else None
