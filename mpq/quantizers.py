"""Weights -> integer codes and back: the three primitives that everything else is built from.

`quantize` chooses scales and rounds, `dequantize` gives the weights that the codes stand for, `fake_quantize` is one
after the other. Measuring, training and packing all use these, so what is measured is what is stored, bit for bit.

Methods: symmetric levels after Li et al. 2023, Eq. 5-6 (with the step max|w| / (2^(n-1) - 1), so that the levels span
the weights); asymmetric levels and sub-channel scales after Rybakov et al. 2023, whose clipping searches the range
with the smallest error. Rounding is to nearest, ties to even, by multiplication with 1 / scale: as torch's own
fake-quantize operators, to which the results are equal for the same scales.

Legend: a weight of shape (C, ...) is a matrix of C rows and K columns, each row cut into G groups that share a scale
(one group a row for "channel"; for "tensor" the whole matrix is one row and one group).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.records import QuantSpec

__all__ = ["QuantSpec", "Quantized", "code_range", "dequantize", "fake_quantize", "quantize", "scale_shape"]

CLIP_RATIOS = tuple(ratio / 40 for ratio in range(40, 3, -1))
"""What share of the range "mse" and "mae" try: 1, 0.975, ... 0.1."""


@dataclass(frozen=True)
class Quantized:
    """A weight as stored.

    Attributes:
        codes: The weight's shape; int8 in [-q_max, q_max] (symmetric) or uint8 in [0, 2^n - 1] (asymmetric).
        scale: (C, G) float32 ("tensor": (1, 1)), each value exact in the spec's scale_dtype.
        zero_point: (C, G) uint8 in [0, 2^n - 1]; None when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """Returns (q_min, q_max).

    >>> code_range(QuantSpec(3, scheme="symmetric")), code_range(QuantSpec(3, scheme="asymmetric"))
    ((-3, 3), (0, 7))
    >>> code_range(QuantSpec(1, scheme="symmetric"))  # and 0 is not used: sign(w)
    (-1, 1)
    """
    if spec.scheme == "asymmetric":
        return 0, 2**spec.bits - 1
    q_max = max(2 ** (spec.bits - 1) - 1, 1)
    return -q_max, q_max


def scale_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Returns (C, G), the shape of the scales of a weight of this shape.

    >>> scale_shape((176, 176, 31), QuantSpec(4, granularity="group:64"))
    (176, 86)
    """
    rows, columns = _matrix_shape(shape, spec)
    return rows, -(-columns // min(spec.group_size or columns, columns))


def quantize(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Returns codes, scales and zero points of a weight.

    A group of zeros gets codes that stand for zeros. Asymmetric ranges always include zero, so that a zero weight
    stays zero and the zero point is a code. At 1 bit symmetric is sign(w) * mean|w| (Rastegari et al. 2016), which
    has nothing to clip.

    Args:
        weight: Of any shape with at least one element, floating point, finite; computed in float32.

    Raises:
        MpqError: The weight is empty or not finite, or a scale does not fit into scale_dtype.
    """
    if weight.numel() == 0:
        raise MpqError(f"weight of shape {tuple(weight.shape)}: expected at least one element to quantize")
    rows, columns = _matrix_shape(tuple(weight.shape), spec)
    matrix = weight.detach().to(torch.float32).reshape(rows, columns)
    if not matrix.isfinite().all():
        raise MpqError(f"weight of shape {tuple(weight.shape)}: expected finite values, got NaN or infinity")
    size = min(spec.group_size or columns, columns)
    whole = columns // size * size  # the last group of a row may be shorter: it is a part of its own
    parts = [matrix[:, :whole].reshape(rows, whole // size, size), matrix[:, None, whole:]]
    results = [_quantize_groups(part, spec) for part in parts if part.numel()]
    return Quantized(
        codes=torch.cat([codes.flatten(1) for codes, _, _ in results], dim=1).reshape(weight.shape),
        scale=torch.cat([scale for _, scale, _ in results], dim=1),
        zero_point=None if spec.scheme == "symmetric" else torch.cat([zero for _, _, zero in results], dim=1),
    )


def dequantize(quantized: Quantized, spec: QuantSpec) -> Tensor:
    """Returns the float32 weight that the codes stand for: (codes - zero_point) * scale, in the weight's shape."""
    shape = tuple(quantized.codes.shape)
    rows, columns = _matrix_shape(shape, spec)
    size = min(spec.group_size or columns, columns)
    levels = quantized.codes.reshape(rows, columns).to(torch.float32)
    if quantized.zero_point is not None:
        levels = levels - _per_column(quantized.zero_point.to(torch.float32), size, columns)
    return (levels * _per_column(quantized.scale, size, columns)).reshape(shape)


def fake_quantize(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the weight rounded to its levels, float32: what a packed file gives back, bit for bit.

    >>> fake_quantize(torch.tensor([[-1.0, 0.1, 0.9]]), QuantSpec(2, "symmetric", "channel", "none"))
    tensor([[-1.,  0.,  1.]])
    """
    return dequantize(quantize(weight, spec), spec)


def _matrix_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    numel = math.prod(shape)
    rows = 1 if spec.granularity == "tensor" or len(shape) < 2 else shape[0]
    return rows, numel // rows


def _per_column(values: Tensor, size: int, columns: int) -> Tensor:
    """Returns (C, K) from (C, G): each group's value for each of its columns."""
    return values if values.shape[1] == 1 else values.repeat_interleave(size, dim=1)[:, :columns]


def _quantize_groups(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes (C, G, size), scale and zero point (C, G) of full groups (C, G, size)."""
    if spec.bits == 1 and spec.scheme == "symmetric":
        scale = _stored(groups.abs().mean(dim=-1), spec)  # 0 for a group of zeros, whose codes then stand for zeros
        return torch.where(groups >= 0, 1, -1).to(torch.int8), scale, torch.zeros_like(scale)
    low, high = _range(groups, spec)
    scale, zero_point = _scale_and_zero_point(low, high, spec)
    if spec.clip in ("mse", "mae"):
        best = _error(groups, scale, zero_point, spec)
        for ratio in CLIP_RATIOS[1:]:
            candidate = _scale_and_zero_point(low * ratio, high * ratio, spec)
            error = _error(groups, *candidate, spec)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, candidate[0], scale)
            zero_point = torch.where(better, candidate[1], zero_point)
    code_dtype = torch.int8 if spec.scheme == "symmetric" else torch.uint8
    return _codes(groups, scale, zero_point, spec).to(code_dtype), scale, zero_point.to(torch.uint8)


def _range(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the (C, G) ends of the range, before any search."""
    if spec.percentile is None:
        if spec.scheme == "symmetric":
            high = groups.abs().amax(dim=-1)
            return -high, high
        low, high = groups.aminmax(dim=-1)
    else:
        share = spec.percentile / 100
        if spec.scheme == "symmetric":
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
    q_min, q_max = code_range(spec)
    if spec.scheme == "symmetric":
        return _divisor(high / q_max, spec), torch.zeros_like(high)
    scale = _divisor((high - low) / (q_max - q_min), spec)
    return scale, torch.round(-low / scale).clamp_(q_min, q_max)


def _stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the scale rounded to scale_dtype; up where float16 has few digits left, so that no weight is cut off."""
    stored = scale.to(getattr(torch, spec.scale_dtype)).to(torch.float32)
    if spec.scale_dtype == "float16":
        stored = torch.where(scale < 2.0**-14, torch.ceil(scale * 2.0**24) / 2.0**24, stored)
    if not stored.isfinite().all():
        raise MpqError(f"scale {float(scale.max()):g} does not fit into {spec.scale_dtype}; use scale_dtype float32")
    return stored


def _divisor(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the scale rounded to scale_dtype, at least its smallest positive value."""
    smallest = 2.0**-24 if spec.scale_dtype == "float16" else torch.finfo(torch.float32).tiny
    return _stored(scale, spec).clamp_(min=smallest)


def _codes(groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Returns float32 codes (C, G, size)."""
    q_min, q_max = code_range(spec)
    codes = torch.round(groups * scale.reciprocal()[..., None])
    return codes.add_(zero_point[..., None]).clamp_(q_min, q_max)


def _error(groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the (C, G) squared ("mse") or absolute ("mae") error of each group."""
    levels = _codes(groups, scale, zero_point, spec).sub_(zero_point[..., None])
    error = levels.mul_(scale[..., None]).sub_(groups)
    return (error.square_() if spec.clip == "mse" else error.abs_()).sum(dim=-1)
