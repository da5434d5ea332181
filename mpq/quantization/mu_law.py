"""Levels that lie closer together near zero: the centroids of the General Quantizer (Zhen et al. 2022, 3.2-3.3).

m = 2^bits numbers, linearly spaced from -1 to 1, are warped by mu-law expansion, which leaves the poles where they are
and draws the rest towards zero, the more the larger mu is. Each is then rounded to a multiple of 1/128, so that the
levels of any width are some of INT8's. A weight is a centroid times its group's scale.

The multiples of 1/128 make the rounding cheap: which centroid is the nearest changes only at multiples of 1/256, so it
is looked up in a table of 512 cells, where a binary search (`torch.bucketize`) takes over ten times as long.

Legend: m centroids, as whole numbers k in [-128, 127] that stand for k / 128, ascending; some may be equal.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mpq.quantization.grids import choose_grid, rounding_error
from mpq.quantization.levels import Levels
from mpq.quantization.scales import normalised, range_around_zero, stored_scale
from mpq.quantization.spec import QuantSpec

UNIT = 128
"""A centroid k stands for k / UNIT."""

MUS = tuple(2.0 ** (half / 2) - 1 for half in range(17))
"""The values of mu that are tried: 0 (linear), 0.41, 1, 1.83, 3, ... 255 (that of telephony): such that (1 + mu), which
Eq. 5 raises to the power |z|, grows by the square root of 2 from one to the next."""


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


def choose_centroids(parts: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """Returns the (2^bits,) int8 mu-law centroids, of all `MUS`, that give a weight the smallest squared error.

    mu is chosen with the scales before the search, and where there is one, once more with those that it finds: that
    comes close to a search of both together (docs/quantizers.md).

    Args:
        parts: The weight as groups of one size, (C, G, size) each.
        spec: The quantizer, of the scheme "mulaw".

    Raises:
        MpqError: A scale does not fit into the spec's scale_dtype.
    """
    candidates = [mu_law_centroids(int(spec.bits), mu).to(parts[0].device) for mu in MUS]
    if spec.bits == 1:
        return candidates[0]  # the poles alone, whatever mu is
    squared = replace(spec, clip="mse")
    chosen = candidates[0]
    is_searched = spec.clip in ("mse", "mae")
    for step in [replace(spec, clip="none"), spec] if is_searched else [spec]:
        grids = [choose_grid(part, step, chosen) for part in parts]
        errors = []
        for one in candidates:
            pairs = zip(parts, grids, strict=True)
            errors.append(sum(float(rounding_error(part, *grid, squared, one).double().sum()) for part, grid in pairs))
        chosen = candidates[errors.index(min(errors))]
    return chosen


def nearest_centroids(values: Tensor, centroids: Tensor) -> Tensor:
    """Returns the int64 index of the centroid next to each value; the upper one in the middle between two.

    >>> nearest_centroids(torch.tensor([-2.0, -0.1, 0.25, 0.3]), torch.tensor([-128, 0, 64], dtype=torch.int8))
    tensor([0, 1, 2, 2])

    Args:
        values: float32 numbers of any shape, in units of 1 (most of them in [-1, 1]).
        centroids: (m,) int8, ascending.
    """
    return _look_up(values, _nearest_table(centroids))


def nearest_levels(values: Tensor, centroids: Tensor) -> Tensor:
    """Returns the nearest centroid itself, float32 in units of 1, for arguments as of `nearest_centroids`."""
    return _look_up(values, centroid_levels(_nearest_table(centroids), centroids))


def centroid_levels(codes: Tensor, centroids: Tensor) -> Tensor:
    """Returns the float32 levels, in units of 1, of whole-number codes of any shape; `centroids` are (m,) int8."""
    levels = centroids.to(torch.float32) / UNIT
    return levels.index_select(0, codes.flatten().to(torch.int64)).reshape(codes.shape)


def _nearest_table(centroids: Tensor) -> Tensor:
    """Returns the (512,) int64 index of the nearest centroid for each cell of width 1/256, from -1 on."""
    middles = centroids[1:].to(torch.int64) + centroids[:-1].to(torch.int64)  # in units of 1/256
    cells = torch.arange(-2 * UNIT, 2 * UNIT, device=centroids.device)
    return torch.searchsorted(middles, cells, right=True)  # how many middles are not above


def _look_up(values: Tensor, table: Tensor) -> Tensor:
    cell = (values * (2 * UNIT)).floor_().clamp_(-2 * UNIT, 2 * UNIT - 1).add_(2 * UNIT).to(torch.int64)
    return table.index_select(0, cell.flatten()).reshape(values.shape)


@final
class MuLaw(Levels):
    """Levels scale * centroid, with the centroids that fit the whole weight best."""

    def bounds(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return range_around_zero(groups, spec)

    def spread(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return stored_scale(high, spec), torch.zeros_like(high)  # 0 for zeros: not every set of centroids has a zero

    def centroids(self, parts: Sequence[Tensor], spec: QuantSpec) -> Tensor:
        return choose_centroids(parts, spec)

    def nearest(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        assert centroids is not None, "mu-law levels without centroids"
        return nearest_centroids(normalised(groups, scale), centroids).to(torch.float32)

    def rounded(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        assert centroids is not None, "mu-law levels without centroids"
        return nearest_levels(normalised(groups, scale), centroids)

    def of(self, codes: Tensor, spec: QuantSpec, centroids: Tensor | None) -> Tensor:
        assert centroids is not None, "mu-law levels without centroids"
        return centroid_levels(codes, centroids)
