"""Weights -> integer codes and back: the three primitives that everything else is built from.

`quantize` chooses scales and rounds, `dequantize` gives the weights that the codes stand for, `fake_quantize` is one
after the other. Measuring, training and packing all use these, so what is measured is what is stored, bit for bit.
`mpq.quantization.grids` chooses the levels and rounds to nearest, `mpq.quantization.gptq` rounds by the layer's inputs.

Legend: as in `mpq.quantization.grids`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization.grids import Rounded, matrix_shape, split_groups
from mpq.quantization.levels import levels_of
from mpq.quantization.spec import ROUNDINGS, QuantSpec
from mpq.quantization.steps import step_factors

Rounder = Callable[[Tensor, Sequence[QuantSpec], Tensor | None, Sequence[Tensor | None]], list[Rounded]]
"""A rounding; arguments and result are those of `mpq.quantization.grids.nearest`."""


@dataclass(frozen=True)
class Quantized:
    """A weight as stored.

    Attributes:
        codes: The weight's shape; int8 where the scheme has negative codes (symmetric), else uint8; int32 where they
            have no bounds (entropy).
        scale: (C, G) float32 ("tensor": (1, 1)), each value exact in the spec's scale_dtype.
        zero_point: (C, G) uint8 in [0, 2^n - 1]; None for a scheme without zero points.
        centroids: (2^n,) int8, ascending, in units of 1/128: the levels that the codes number; None for a scheme that
            has none.
        exponents: (C,) of the rows and (K,) of the columns, int8: the step of weight (i, j) is
            scale * 2^((row_i + column_j) / 4) (`mpq.quantization.steps`); None: it is the scale.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    centroids: Tensor | None = None
    exponents: tuple[Tensor, Tensor] | None = None


def quantize(weight: Tensor, spec: QuantSpec, gram: Tensor | None = None, centroids: Tensor | None = None) -> Quantized:
    """Returns codes, scales, and zero points or centroids of a weight.

    A group of zeros gets codes that stand for zeros. Asymmetric ranges always include zero, so that a zero weight
    stays zero and the zero point is a code. At 1 bit symmetric is sign(w) * mean|w| (Rastegari et al. 2016), which
    has nothing to clip.

    Args:
        weight: Finite floating-point numbers, at least one, of any shape; computed in float32.
        spec: The quantizer.
        gram: For a rounding that needs statistics: (B, K, K) sums of outer products of the inputs, as
            `mpq.sensitivity.statistics.input_grams` collects them; others do not look at it.
        centroids: For a scheme that has them: (2^bits,) int8 to use instead of those that fit the weight best.

    Raises:
        MpqError: The weight is empty or not finite, a scale does not fit into scale_dtype, or there are no statistics
            (`gram`) for a rounding that needs them, or some that do not fit.
    """
    return _quantize(weight, [spec], gram, centroids)[0]


def quantize_widths(
    weight: Tensor, spec: QuantSpec, widths: Sequence[float], gram: Tensor | None = None
) -> list[Quantized]:
    """Returns the results of `quantize` at each of several bit-widths; gptq takes far less time for all at once."""
    return _quantize(weight, [replace(spec, bits=bits) for bits in widths], gram, None)


def _quantize(
    weight: Tensor, specs: Sequence[QuantSpec], gram: Tensor | None, centroids: Tensor | None
) -> list[Quantized]:
    """Returns the results of `quantize` for several specs that differ in their bits alone."""
    if weight.numel() == 0:
        raise MpqError(f"weight of shape {tuple(weight.shape)}: expected at least one element to quantize")
    if not weight.isfinite().all():
        raise MpqError(f"weight of shape {tuple(weight.shape)}: expected finite values, got NaN or infinity")
    weight = weight.detach().to(torch.float32)
    spec = specs[0]
    if spec.needs_statistics and gram is None:
        raise MpqError(f"rounding {spec.rounding}: expected statistics of the layer's inputs, got none")
    matrix = weight.flatten(1) if weight.ndim > 1 else weight.reshape(1, -1)
    tables = [_centroids(matrix, one) if centroids is None else centroids for one in specs]
    round_to: Rounder = resolve_name(ROUNDINGS[spec.rounding].function)
    statistics = gram.to(weight.device) if spec.needs_statistics and gram is not None else None
    results = round_to(matrix, specs, statistics, tables)
    shape = tuple(weight.shape)
    return [as_stored(shape, one, found, table) for one, found, table in zip(specs, results, tables, strict=True)]


def _centroids(matrix: Tensor, spec: QuantSpec) -> Tensor | None:
    """Returns the centroids that a matrix (C, K) of weights gets; None for a scheme that has none."""
    if not spec.record.has_centroids:
        return None
    return levels_of(spec).centroids(split_groups(matrix.reshape(matrix_shape(tuple(matrix.shape), spec)), spec), spec)


def as_stored(shape: tuple[int, ...], spec: QuantSpec, rounded: Rounded, centroids: Tensor | None) -> Quantized:
    """Returns a weight of this shape as stored.

    Args:
        shape: The shape of the weight.
        spec: The quantizer.
        rounded: The weight; its zero points are not looked at for a scheme that has none.
        centroids: (2^bits,) int8; None for a scheme that has none.
    """
    first, last = spec.codes[0], spec.codes[-1]
    integers = torch.uint8 if first >= 0 else torch.int8 if last <= 127 else torch.int32
    return Quantized(
        codes=rounded.codes.to(integers).reshape(shape),
        scale=rounded.scale,
        zero_point=rounded.zero_point.to(torch.uint8) if spec.record.has_zero_points else None,
        centroids=centroids,
        exponents=rounded.exponents,
    )


def dequantize(quantized: Quantized, spec: QuantSpec) -> Tensor:
    """Returns the float32 weight that the codes stand for, in the weight's shape.

    It is (codes - zero_point) * scale, or centroids[codes] / 128 * scale where there are centroids, or codes * step
    where steps differ among rows and columns. The spec is that of the codes, their bits included.
    """
    shape = tuple(quantized.codes.shape)
    if quantized.exponents is not None:
        steps = quantized.scale * step_factors(quantized.exponents)
        return (quantized.codes.reshape(steps.shape).to(torch.float32) * steps).reshape(shape)
    rows, columns = matrix_shape(shape, spec)
    size = min(spec.group_size or columns, columns)
    codes = quantized.codes.reshape(rows, columns)
    levels = levels_of(spec).of(codes, spec, quantized.centroids)
    if quantized.zero_point is not None:
        levels = levels - _per_column(quantized.zero_point.to(torch.float32), size, columns)
    return (levels * _per_column(quantized.scale, size, columns)).reshape(shape)


def fake_quantize(weight: Tensor, spec: QuantSpec, gram: Tensor | None = None) -> Tensor:
    """Returns the weight rounded to its levels, float32: what a packed file gives back, bit for bit.

    >>> fake_quantize(torch.tensor([[-1.0, 0.1, 0.9]]), QuantSpec(2, "symmetric", "channel", "none"))
    tensor([[-1.,  0.,  1.]])
    """
    return dequantize(quantize(weight, spec, gram), spec)


def _per_column(values: Tensor, size: int, columns: int) -> Tensor:
    """Returns (C, K) from (C, G): each group's value for each of its columns."""
    return values if values.shape[1] == 1 else values.repeat_interleave(size, dim=1)[:, :columns]
