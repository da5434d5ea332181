"""How a weight tensor is quantized: the options, without the mathematics (and without torch)."""

import math
import re
from dataclasses import dataclass

from mpq.errors import MpqError

MIN_BITS, MAX_BITS = 1, 8
FLOAT_BITS = (16, 32)
"""Widths of a layer that is left unquantized: IEEE half and single precision."""

SCHEMES = ("symmetric", "asymmetric", "mulaw")
SCALE_DTYPES = ("float16", "float32")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class QuantSpec:
    """How one weight tensor is quantized. The defaults are the measured best of docs/quantizers.md.

    A weight of shape (C, ...) is seen as a matrix of C rows (output channels) and K columns (all that one output
    channel reads: input channels times kernel positions).

    Attributes:
        bits: Width of a code, 1 to 8.
        scheme: "symmetric": levels scale * {-(2^(n-1)-1) ... 2^(n-1)-1}; at 1 bit scale * {-1, 1}.
            "asymmetric": levels scale * ({0 ... 2^n-1} - zero_point) with an integer zero point.
            "mulaw": levels scale * 2^n centroids that lie closer together near zero (mpq.quantization.mu_law);
                "nearest" only.
        granularity: What shares a scale: "tensor", "channel" (a row), or "group:G" (G consecutive columns of a row;
            the last group of a row is shorter when G does not divide K).
        clip: How the range is chosen: "none" (all weights inside), "mse" or "mae" (searched for the smallest squared
            or absolute error), "percentile:P" (P in (50, 100], of the sorted weights).
        rounding: "nearest", or "gptq": errors are made up for, by the statistics of the layer's inputs
            (mpq.quantization.gptq).
        scale_dtype: "float16" or "float32": how scales are stored, and so what values they can take.
    """

    bits: int
    scheme: str = "asymmetric"
    granularity: str = "group:64"
    clip: str = "mse"
    rounding: str = "nearest"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise MpqError(f"bits: expected a whole number from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}")
        for key in ("granularity", "clip"):
            if not isinstance(getattr(self, key), str):
                raise MpqError(f"{key}: expected a string, got {getattr(self, key)!r}")
        for key, known in (("scheme", SCHEMES), ("rounding", ROUNDINGS), ("scale_dtype", SCALE_DTYPES)):
            if getattr(self, key) not in known:
                raise MpqError(f"{key}: expected {' or '.join(known)}, got {getattr(self, key)!r}")
        if self.scheme == "mulaw" and self.rounding == "gptq":
            raise MpqError(
                "rounding: scheme mulaw has no gptq, which needs evenly spaced levels; use --rounding nearest"
            )
        if self.granularity not in ("tensor", "channel") and not re.fullmatch(r"group:[1-9]\d*", self.granularity):
            raise MpqError(f"granularity: expected tensor, channel or group:G with G >= 1, got {self.granularity!r}")
        if self.clip not in ("none", "mse", "mae") and self.percentile is None:
            raise MpqError(f"clip: expected none, mse, mae or percentile:P with 50 < P <= 100, got {self.clip!r}")

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
