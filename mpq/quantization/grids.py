"""Which levels a group of weights gets: a range, searched for the smallest error, and from it scale and zero point.

Symmetric levels after Li et al. 2023, Eq. 5-6 (with the step max|w| / (2^(n-1) - 1), so that the levels span the
weights); asymmetric levels, sub-channel scales and the search for the range after Rybakov et al. 2023; mu-law levels
(`mpq.quantization.mu_law`) after Zhen et al. 2022, with mu searched for the whole weight. Codes are rounded to nearest,
ties to even (mu-law: up), by multiplication with 1 / scale: as torch's own fake-quantize operators, to which the
results are equal for the same scales.

Legend: a weight of shape (C, ...) is a matrix of C rows and K columns, each row cut into G groups of `size` columns
that share a scale (one group a row for "channel"; for "tensor" the whole matrix is one row and one group).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization.mu_law import MUS, mu_law_centroids, nearest_centroids, nearest_levels
from mpq.quantization.spec import QuantSpec

CLIP_RATIOS = tuple(ratio / 40 for ratio in range(40, 3, -1))
"""What share of the range "mse" and "mae" try: 1, 0.975, ... 0.1."""

_AT_ONCE = 2**19
"""Levels that are tried in one operation: enough to hide its overhead, few enough for a processor's cache."""


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """Returns (q_min, q_max).

    >>> code_range(QuantSpec(3, scheme="symmetric")), code_range(QuantSpec(3, scheme="asymmetric"))
    ((-3, 3), (0, 7))
    >>> code_range(QuantSpec(1, scheme="symmetric"))  # and 0 is not used: sign(w)
    (-1, 1)
    """
    if spec.scheme != "symmetric":
        return 0, 2**spec.bits - 1
    q_max = max(2 ** (spec.bits - 1) - 1, 1)
    return -q_max, q_max


def is_sign(spec: QuantSpec) -> bool:
    """Returns whether the levels are sign(w) * scale, without zero: 1 bit symmetric (Rastegari et al. 2016)."""
    return spec.bits == 1 and spec.scheme == "symmetric"


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


def choose_centroids(parts: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """Returns the (2^bits,) int8 mu-law centroids, of all `MUS`, that give a weight the smallest squared error.

    mu is chosen with the scales before the search, and where there is one, once more with those that it finds: that
    comes close to a search of both together (docs/quantizers.md).

    Args:
        parts: The weight as groups of one size, (C, G, size) each.
        spec: Of the scheme "mulaw".

    Raises:
        MpqError: A scale does not fit into the spec's scale_dtype.
    """
    candidates = [mu_law_centroids(spec.bits, mu).to(parts[0].device) for mu in MUS]
    if spec.bits == 1:
        return candidates[0]  # of the poles alone, whatever mu is
    squared = replace(spec, clip="mse")
    chosen = candidates[0]
    is_searched = spec.clip in ("mse", "mae")
    for step in [replace(spec, clip="none"), spec] if is_searched else [spec]:
        grids = [choose_grid(part, step, chosen) for part in parts]
        errors = [
            sum(
                float(_error(part, *grid, squared, one).double().sum()) for part, grid in zip(parts, grids, strict=True)
            )
            for one in candidates
        ]
        chosen = candidates[errors.index(min(errors))]
    return chosen


def choose_grid(groups: Tensor, spec: QuantSpec, centroids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point, (C, G) float32 each, of groups of weights (C, G, size).

    At 1 bit without a zero point the scale is mean|w|, the least squares of scale * sign(w), and nothing is searched.

    Args:
        groups: The weights, float32.
        spec: The quantizer.
        centroids: (2^bits,) int8: those of the scheme "mulaw", needed where there is a search.

    Raises:
        MpqError: A scale does not fit into the spec's scale_dtype.
    """
    return clipped_grid(groups, spec, choose_clip(groups, spec, centroids))


def choose_clip(groups: Tensor, spec: QuantSpec, centroids: Tensor | None = None) -> Tensor:
    """Returns the (C, G) share of the range of groups of weights (C, G, size) that gives the smallest error.

    It is searched (Rybakov et al. 2023) where the spec's clip is "mse" or "mae", else 1. Arguments as `choose_grid`.
    """
    chosen = groups.new_ones(groups.shape[:-1])
    if spec.clip not in ("mse", "mae") or _has_two_levels(spec):
        return chosen
    low, high = _range(groups, spec)
    best = torch.full_like(low, torch.inf)
    ratios = torch.tensor(CLIP_RATIOS, device=groups.device)
    for some in ratios.split(max(_AT_ONCE // groups.numel(), 1)):
        candidates = _scale_and_zero_point(low * some[:, None, None], high * some[:, None, None], spec)
        error, index = _error(groups, *candidates, spec, centroids).min(dim=0)
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
        scale = _stored(groups.abs().mean(dim=-1), spec)  # 0 for a group of zeros, whose codes then stand for zeros
        return scale, torch.zeros_like(scale)
    low, high = _range(groups, spec)
    return _scale_and_zero_point(low * ratio, high * ratio, spec)


def _has_two_levels(spec: QuantSpec) -> bool:
    """Returns whether the levels are the poles alone, without a zero point."""
    return spec.bits == 1 and spec.scheme != "asymmetric"


def nearest_codes(
    groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None = None
) -> Tensor:
    """Returns the float32 codes (C, G, size) of the levels next to the weights; scale and zero point are (C, G)."""
    if is_sign(spec):
        return torch.where(groups >= 0, 1.0, -1.0)
    if centroids is not None:
        return nearest_centroids(normalised(groups, scale), centroids).to(torch.float32)
    q_min, q_max = code_range(spec)
    codes = torch.round(groups * scale.reciprocal()[..., None])
    return codes.add_(zero_point[..., None]).clamp_(q_min, q_max)


def normalised(groups: Tensor, scale: Tensor) -> Tensor:
    """Returns groups (..., C, G, size) in units of their scale (..., C, G); zeros where the scale is zero."""
    return groups * scale.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[..., None]


def _range(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the (C, G) ends of the range, before any search."""
    if spec.percentile is None:
        if spec.scheme != "asymmetric":
            high = groups.abs().amax(dim=-1)
            return -high, high
        low, high = groups.aminmax(dim=-1)
    else:
        share = spec.percentile / 100
        if spec.scheme != "asymmetric":
            high = _quantile(groups.abs(), share)
            return -high, high
        low, high = _quantile(groups, 1 - share), _quantile(groups, share)
    return low.clamp(max=0), high.clamp(min=0)


def _quantile(groups: Tensor, share: float) -> Tensor:
    """Returns the (C, G) quantile with linear interpolation (torch.quantile refuses more than 2^24 elements)."""
    ordered = groups.sort(dim=-1).values
    position = share * (groups.shape[-1] - 1)
    below = math.floor(position)
    above = min(below + 1, groups.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)


def _scale_and_zero_point(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns scales and (float32) zero points that spread the codes over [low, high]."""
    if spec.scheme == "mulaw":
        return _stored(high, spec), torch.zeros_like(high)  # 0 for zeros, as not every set of centroids has a zero
    q_min, q_max = code_range(spec)
    if spec.scheme == "symmetric":
        return storable_scale(high / q_max, spec), torch.zeros_like(high)
    scale = storable_scale((high - low) / (q_max - q_min), spec)
    return scale, torch.round(-low / scale).clamp_(q_min, q_max)


def _stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the scale rounded to scale_dtype; up where float16 has few digits left, so that no weight is cut off."""
    stored = scale.to(getattr(torch, spec.scale_dtype)).to(torch.float32)
    if spec.scale_dtype == "float16":
        stored = torch.where(scale < 2.0**-14, torch.ceil(scale * 2.0**24) / 2.0**24, stored)
    if not stored.isfinite().all():
        raise MpqError(f"scale {float(scale.max()):g} does not fit into {spec.scale_dtype}; use scale_dtype float32")
    return stored


def storable_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the scale rounded to scale_dtype, at least its smallest positive value.

    Raises:
        MpqError: It does not fit into scale_dtype.
    """
    smallest = 2.0**-24 if spec.scale_dtype == "float16" else torch.finfo(torch.float32).tiny
    return _stored(scale, spec).clamp_(min=smallest)


def _error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None = None
) -> Tensor:
    """Returns the (..., C, G) squared ("mse") or absolute ("mae") error of each group, for scales (..., C, G)."""
    if centroids is not None:
        levels = nearest_levels(normalised(groups, scale), centroids)
    else:
        levels = nearest_codes(groups, scale, zero_point, spec).sub_(zero_point[..., None])
    error = levels.mul_(scale[..., None]).sub_(groups)
    return (error.square_() if spec.clip == "mse" else error.abs_()).sum(dim=-1)
