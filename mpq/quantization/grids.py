"""The levels of a group of weights: a range, searched for the smallest error, and from it scale and zero point.

Sub-channel scales and the search for the range are those of Rybakov et al. 2023. The differences between schemes are
in `mpq.quantization.uniform` (symmetric, asymmetric) and `mpq.quantization.mu_law`.

Legend: a weight of shape (C, ...) is a matrix of C rows and K columns, each row cut into G groups of `size` columns
that share a scale (one group a row for "channel"; for "tensor" the whole matrix is one row and one group).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpq.quantization.levels import levels_of
from mpq.quantization.scales import stored_scale
from mpq.quantization.spec import QuantSpec

CLIP_RATIOS = tuple(ratio / 40 for ratio in range(40, 3, -1))
"""Shares of the range that "mse" and "mae" try: 1, 0.975, ... 0.1."""

_AT_ONCE = 2**19
"""Levels that are tried in one operation: enough to hide its overhead, few enough for a processor's cache."""


def matrix_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Returns (C, K) of a weight of this shape: one row for granularity "tensor" and for a vector."""
    numel = math.prod(shape)
    rows = 1 if spec.granularity == "tensor" or len(shape) < 2 else shape[0]
    return rows, numel // rows


def scale_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Returns (C, G), the shape of the scales of a weight of this shape.

    >>> scale_shape((176, 176, 31), QuantSpec(4, granularity="group:64"))
    (176, 86)
    """
    rows, columns = matrix_shape(shape, spec)
    return rows, -(-columns // min(spec.group_size or columns, columns))


def split_groups(matrix: Tensor, spec: QuantSpec) -> list[Tensor]:
    """Returns a matrix (C, K) as one or two parts (C, G, size): a shorter last group of each row is a part of its own.

    >>> [tuple(part.shape) for part in split_groups(torch.zeros(2, 11), QuantSpec(4, granularity="group:4"))]
    [(2, 2, 4), (2, 1, 3)]
    """
    rows, columns = matrix.shape
    size = min(spec.group_size or columns, columns)
    whole = columns // size * size
    parts = [matrix[:, :whole].reshape(rows, whole // size, size), matrix[:, None, whole:]]
    return [part for part in parts if part.numel()]


def choose_grid(groups: Tensor, spec: QuantSpec, centroids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point, (C, G) float32 each, of groups of weights (C, G, size).

    At 1 bit without a zero point the scale is mean|w|, the least squares of scale * sign(w), and nothing is searched.

    Args:
        groups: The weights, float32.
        spec: The quantizer.
        centroids: (2^bits,) int8 of a scheme that has them, needed where there is a search.

    Raises:
        MpqError: A scale does not fit into the spec's scale_dtype.
    """
    return clipped_grid(groups, spec, choose_clip(groups, spec, centroids))


def choose_clip(groups: Tensor, spec: QuantSpec, centroids: Tensor | None = None) -> Tensor:
    """Returns the (C, G) share of the range of groups of weights (C, G, size) that gives the smallest error.

    It is searched (Rybakov et al. 2023) where the spec's clip is "mse" or "mae", else 1. The arguments are those of
    `choose_grid`.
    """
    chosen = groups.new_ones(groups.shape[:-1])
    if spec.clip not in ("mse", "mae") or _has_two_levels(spec):
        return chosen
    levels = levels_of(spec)
    low, high = levels.bounds(groups, spec)
    best = torch.full_like(low, torch.inf)
    ratios = torch.tensor(CLIP_RATIOS, device=groups.device)
    for some in torch.split(ratios, max(_AT_ONCE // groups.numel(), 1)):
        candidates = levels.spread(low * some[:, None, None], high * some[:, None, None], spec)
        error, index = rounding_error(groups, *candidates, spec, centroids).min(dim=0)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, some[index], chosen)
    return chosen


def clipped_grid(groups: Tensor, spec: QuantSpec, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point, (C, G) float32 each, that spread the codes over a (C, G) share of the range.

    Raises:
        MpqError: A scale does not fit into the spec's scale_dtype.
    """
    if _has_two_levels(spec):
        # 0 for a group of zeros, whose codes then stand for zeros
        scale = stored_scale(groups.abs().mean(dim=-1), spec)
        return scale, torch.zeros_like(scale)
    low, high = levels_of(spec).bounds(groups, spec)
    return levels_of(spec).spread(low * ratio, high * ratio, spec)


def _has_two_levels(spec: QuantSpec) -> bool:
    """Returns whether there are two levels, one on each side of zero."""
    return len(spec.codes) == 2 and not spec.record.has_zero_points


def nearest_codes(
    groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None = None
) -> Tensor:
    """Returns the float32 codes (C, G, size) of the levels next to the weights; scale and zero point are (C, G)."""
    return levels_of(spec).nearest(groups, scale, zero_point, spec, centroids)


class Rounded(NamedTuple):
    """The result of a rounding.

    Attributes:
        codes: float32, as many as weights in their order.
        scale, zero_point: (C, G) float32.
        exponents: (C,) of the rows and (K,) of the columns, int8, of steps that differ among them
            (`mpq.quantization.steps`); None where one scale is the step of its whole group.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    exponents: tuple[Tensor, Tensor] | None = None


def nearest(
    matrix: Tensor, specs: Sequence[QuantSpec], gram: Tensor | None, tables: Sequence[Tensor | None]
) -> list[Rounded]:
    """Returns weights rounded to the level next to them, for each of several specs.

    Args:
        matrix: (C, K) float32 weights, the rows of which are one with granularity "tensor".
        specs: The quantizers, which differ in their bits alone; there is one result for each.
        gram: (B, K, K) statistics of the inputs for the roundings that need them, which this one does not.
        tables: The (2^bits,) int8 centroids for each spec, None for a scheme that has none.

    Raises:
        MpqError: A scale does not fit into the spec's scale_dtype.
    """
    results = []
    for spec, centroids in zip(specs, tables, strict=True):
        found = []
        for part in split_groups(matrix.reshape(matrix_shape(tuple(matrix.shape), spec)), spec):
            scale, zero_point = choose_grid(part, spec, centroids)
            found.append((nearest_codes(part, scale, zero_point, spec, centroids).flatten(1), scale, zero_point))
        codes, scales, zero_points = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
        results.append(Rounded(codes, scales, zero_points))
    return results


def rounding_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None = None
) -> Tensor:
    """Returns the (..., C, G) squared ("mse") or absolute ("mae") error of each group, for scales (..., C, G)."""
    levels = levels_of(spec).rounded(groups, scale, zero_point, spec, centroids)
    error = levels.mul_(scale[..., None]).sub_(groups)
    return (error.square_() if spec.clip == "mse" else error.abs_()).sum(dim=-1)
