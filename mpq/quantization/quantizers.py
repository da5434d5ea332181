"""Weights -> integer codes and back: the three primitives that everything else is built from.

`quantize` chooses scales and rounds, `dequantize` gives the weights that the codes stand for, `fake_quantize` is one
after the other. Measuring, training and packing all use these, so what is measured is what is stored, bit for bit.
`mpq.quantization.grids` has the levels, `mpq.quantization.gptq` the rounding that looks at the layer's inputs.

Legend: as in `mpq.quantization.grids`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization.gptq import gptq
from mpq.quantization.grids import (
    CLIP_RATIOS,
    choose_centroids,
    choose_grid,
    code_range,
    matrix_shape,
    nearest_codes,
    scale_shape,
    split_groups,
)
from mpq.quantization.mu_law import centroid_levels
from mpq.quantization.spec import QuantSpec

__all__ = [
    "CLIP_RATIOS",
    "QuantSpec",
    "Quantized",
    "code_range",
    "dequantize",
    "fake_quantize",
    "quantize",
    "quantize_widths",
    "scale_shape",
]


@dataclass(frozen=True)
class Quantized:
    """A weight as stored.

    Attributes:
        codes: The weight's shape; int8 in [-q_max, q_max] (symmetric) or uint8 in [0, 2^n - 1] (asymmetric, mulaw).
        scale: (C, G) float32 ("tensor": (1, 1)), each value exact in the spec's scale_dtype.
        zero_point: (C, G) uint8 in [0, 2^n - 1]; None unless asymmetric.
        centroids: (2^n,) int8, ascending, in units of 1/128: what the codes are indices of; None unless mulaw.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    centroids: Tensor | None = None


def quantize(weight: Tensor, spec: QuantSpec, gram: Tensor | None = None, centroids: Tensor | None = None) -> Quantized:
    """Returns codes, scales, and zero points or centroids of a weight.

    A group of zeros gets codes that stand for zeros. Asymmetric ranges always include zero, so that a zero weight
    stays zero and the zero point is a code. At 1 bit symmetric is sign(w) * mean|w| (Rastegari et al. 2016), which
    has nothing to clip.

    Args:
        weight: Of any shape with at least one element, floating point, finite; computed in float32.
        spec: The quantizer.
        gram: For the rounding "gptq": (B, K, K) sums of outer products of the inputs, as
            `mpq.sensitivity.calibration.input_grams` collects them; others do not look at it.
        centroids: For the scheme "mulaw": (2^bits,) int8 to use instead of those that fit the weight best.

    Raises:
        MpqError: The weight is empty or not finite, a scale does not fit into scale_dtype, or the rounding "gptq" has
            no `gram` or one that does not fit.
    """
    return _quantize(weight, [spec], gram, centroids)[0]


def quantize_widths(
    weight: Tensor, spec: QuantSpec, widths: Sequence[int], gram: Tensor | None = None
) -> list[Quantized]:
    """Returns what `quantize` returns with each of several bit-widths in the spec; with "gptq" in far less time."""
    return _quantize(weight, [replace(spec, bits=bits) for bits in widths], gram, None)


def _quantize(
    weight: Tensor, specs: Sequence[QuantSpec], gram: Tensor | None, centroids: Tensor | None
) -> list[Quantized]:
    """Returns what `quantize` returns, for each of several specs that differ in their bits alone."""
    if weight.numel() == 0:
        raise MpqError(f"weight of shape {tuple(weight.shape)}: expected at least one element to quantize")
    if not weight.isfinite().all():
        raise MpqError(f"weight of shape {tuple(weight.shape)}: expected finite values, got NaN or infinity")
    weight = weight.detach().to(torch.float32)
    spec = specs[0]
    if spec.rounding == "gptq" and gram is None:
        raise MpqError("rounding gptq: expected statistics of the layer's inputs, got none")
    if spec.rounding == "gptq":
        matrix = weight.flatten(1) if weight.ndim > 1 else weight[None]
        results = [(*one, None) for one in gptq(matrix, specs, gram.to(weight.device))]
    else:
        results = [_nearest(weight.reshape(matrix_shape(tuple(weight.shape), one)), one, centroids) for one in specs]
    code_dtype = torch.int8 if spec.scheme == "symmetric" else torch.uint8
    return [
        Quantized(
            codes=codes.to(code_dtype).reshape(weight.shape),
            scale=scale,
            zero_point=zero_point.to(torch.uint8) if spec.scheme == "asymmetric" else None,
            centroids=chosen,
        )
        for codes, scale, zero_point, chosen in results
    ]


def dequantize(quantized: Quantized, spec: QuantSpec) -> Tensor:
    """Returns the float32 weight that the codes stand for, in the weight's shape.

    It is (codes - zero_point) * scale, or centroids[codes] / 128 * scale where there are centroids.
    """
    shape = tuple(quantized.codes.shape)
    rows, columns = matrix_shape(shape, spec)
    size = min(spec.group_size or columns, columns)
    codes = quantized.codes.reshape(rows, columns)
    if quantized.centroids is not None:
        levels = centroid_levels(codes, quantized.centroids)
    else:
        levels = codes.to(torch.float32)
    if quantized.zero_point is not None:
        levels = levels - _per_column(quantized.zero_point.to(torch.float32), size, columns)
    return (levels * _per_column(quantized.scale, size, columns)).reshape(shape)


def fake_quantize(weight: Tensor, spec: QuantSpec, gram: Tensor | None = None) -> Tensor:
    """Returns the weight rounded to its levels, float32: what a packed file gives back, bit for bit.

    >>> fake_quantize(torch.tensor([[-1.0, 0.1, 0.9]]), QuantSpec(2, "symmetric", "channel", "none"))
    tensor([[-1.,  0.,  1.]])
    """
    return dequantize(quantize(weight, spec, gram), spec)


def _nearest(matrix: Tensor, spec: QuantSpec, centroids: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns float32 codes (C, K), scales and zero points (C, G), and centroids (2^bits,), of a matrix (C, K)."""
    parts = split_groups(matrix, spec)
    if spec.scheme == "mulaw" and centroids is None:
        centroids = choose_centroids(parts, spec)
    results = []
    for part in parts:
        scale, zero_point = choose_grid(part, spec, centroids)
        results.append((nearest_codes(part, scale, zero_point, spec, centroids).flatten(1), scale, zero_point))
    codes, scales, zero_points = (torch.cat(values, dim=1) for values in zip(*results, strict=True))
    return codes, scales, zero_points, centroids


def _per_column(values: Tensor, size: int, columns: int) -> Tensor:
    """Returns (C, K) from (C, G): each group's value for each of its columns."""
    return values if values.shape[1] == 1 else values.repeat_interleave(size, dim=1)[:, :columns]
