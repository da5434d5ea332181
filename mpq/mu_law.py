"""Levels that lie closer together near zero: the centroids of the General Quantizer (Zhen et al. 2022, section 3.2-3.3).

m = 2^bits numbers, linearly spaced from -1 to 1, are warped by mu-law expansion, which leaves the poles where they are
and draws the rest towards zero, the more the larger mu is. Each is then rounded to a multiple of 1/128, so that the
levels of any width are some of INT8's. A weight is a centroid times its group's scale.

The multiples of 1/128 make the rounding cheap: which centroid is the nearest changes only at multiples of 1/256, so it
is looked up in a table of 512 cells, where a binary search (`torch.bucketize`) takes 20 times as long.

Legend: m centroids, as whole numbers k in [-128, 127] that stand for k / 128, ascending; some may be equal.
"""

import math

import torch
from torch import Tensor

UNIT = 128
"""A centroid k stands for k / UNIT."""

MUS = tuple(2.0**power - 1 for power in range(9))
"""The values of mu that are tried: 0 (linear), 1, 3, ... 255 (that of telephony). (1 + mu), which is what Eq. 5 raises
to the power |z|, doubles from one to the next; halves of that make no measurable difference (docs/quantizers.md)."""


def mu_law_centroids(bits: int, mu: float) -> Tensor:
    """Returns the (2^bits,) int8 centroids, ascending, in units of 1/128.

    Zhen et al. 2022, Eq. 5: z' = sign(z) ((1 + mu)^|z| - 1) / mu. Unlike the print, which divides by 1 + mu: so the
    poles stay at -1 and 1, as the text says. mu = 0 is the limit z' = z. The pole 1 becomes 127/128 (section 3.3).

    >>> mu_law_centroids(2, 0).tolist(), mu_law_centroids(2, 255).tolist()
    ([-128, -43, 43, 127], [-128, -3, 3, 127])
    """
    z = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    warped = z if mu == 0 else z.sign() * torch.expm1(z.abs() * math.log1p(mu)) / mu
    return (warped * UNIT).round().clamp(-UNIT, UNIT - 1).to(torch.int8)


def nearest_centroids(values: Tensor, centroids: Tensor) -> Tensor:
    """Returns the int64 index of the centroid next to each value; the upper one in the middle between two.

    Args:
        values: Of any shape; finite, float32, in units of 1 (most of them in [-1, 1]).
        centroids: (m,) int8, ascending.
    """
    middles = centroids[1:].to(torch.int64) + centroids[:-1].to(torch.int64)  # in units of 1/256
    cells = torch.arange(-2 * UNIT, 2 * UNIT, device=centroids.device)
    table = torch.searchsorted(middles, cells, right=True)  # (512,): how many middles are not above
    cell = torch.floor(values * (2 * UNIT)).clamp_(-2 * UNIT, 2 * UNIT - 1).add_(2 * UNIT).to(torch.int64)
    return table.index_select(0, cell.flatten()).reshape(values.shape)


def centroid_levels(codes: Tensor, centroids: Tensor) -> Tensor:
    """Returns the float32 levels, in units of 1, of whole-number codes of any shape; `centroids` are (m,) int8."""
    levels = centroids.to(torch.float32) / UNIT
    return levels.index_select(0, codes.flatten().to(torch.int64)).reshape(codes.shape)
