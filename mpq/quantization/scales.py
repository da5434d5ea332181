"""The range of a group of weights, and scales as they are stored.

Legend: as in `mpq.quantization.grids`.
"""

import math

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization.spec import QuantSpec


def range_around_zero(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the ends (C, G) of the smallest range around zero that holds groups (C, G, size), or their percentile."""
    sizes = groups.abs()
    high = sizes.amax(dim=-1) if spec.percentile is None else _quantile(sizes, spec.percentile / 100)
    return -high, high


def range_with_zero(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the ends (C, G) of the smallest range that holds zero and groups (C, G, size), or their percentile."""
    if spec.percentile is None:
        low, high = groups.aminmax(dim=-1)
    else:
        share = spec.percentile / 100
        low, high = _quantile(groups, 1 - share), _quantile(groups, share)
    return low.clamp(max=0), high.clamp(min=0)


def _quantile(groups: Tensor, share: float) -> Tensor:
    """Returns the (C, G) quantile with linear interpolation (torch.quantile refuses more than 2^24 elements)."""
    ordered = groups.sort(dim=-1).values
    position = share * (groups.shape[-1] - 1)
    below = math.floor(position)
    above = min(below + 1, groups.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the scale rounded to scale_dtype; up where float16 has few digits left, so that no weight is cut off.

    Raises:
        MpqError: It does not fit into scale_dtype.
    """
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
    return stored_scale(scale, spec).clamp_(min=smallest)


def normalised(groups: Tensor, scale: Tensor) -> Tensor:
    """Returns groups (..., C, G, size) in units of their scale (..., C, G); zeros where the scale is zero."""
    return groups * scale.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[..., None]
