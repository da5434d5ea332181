"""Rounding that makes up for its own errors (GPTQ, Frantar et al. 2023).

It minimises the error of the layer's output, not that of each weight. For a layer y = W x this error is, summed over
the data, tr(D H D') with D the error of W and H = sum of x x', the Gram matrix of the inputs. Columns are rounded in
order, and the error of each is fed to the columns after it, by as much as the inputs of both go together: with U the
upper Cholesky factor of the inverse of H (U'U), column j's error e adds -e U[j, k] / U[j, j] to each column k after it.
A group's levels are searched when the rounding reaches it, on the weights as they are by then.

H is damped: DAMPING of its mean diagonal is added to the diagonal, so that it can be inverted however little data
there is. Rows that share no inputs (the channels of a depthwise kernel, the parts of a grouped convolution) have a Gram
matrix each. A row whose inputs are all zero can be rounded in any way; it is rounded to nearest.

Legend: B Gram matrices, R rows for each of them, K columns, W bit-widths that are worked on side by side, since the
loop over columns is the same for all and its overhead takes most of the time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization.grids import Rounded, choose_grid
from mpq.quantization.spec import QuantSpec
from mpq.quantization.steps import factors, step_factors, waterfilled

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal (docs/rounding.md says what others do)."""

_BLOCK = 64


def gptq(
    matrix: Tensor, specs: Sequence[QuantSpec], gram: Tensor, tables: Sequence[Tensor | None] = ()
) -> list[Rounded]:
    """Returns rounded weights, codes (C, K), for each of several specs.

    The result for a spec does not depend on which others are there. A scheme whose codes are entropy-coded gets steps
    that differ among rows and columns (`mpq.quantization.steps`): in units of these, weights and inputs are those of
    another layer with the same output, which is rounded like any other.

    Args:
        matrix: (C, K) float32 weights: C = B * R rows; the first R go with the first Gram matrix, and so on.
        specs: The quantizers, which differ in their bits alone; with granularity "tensor" there is one scale, (1, 1).
        gram: (B, K, K) sums of the outer products of the inputs.
        tables: Not looked at: they are centroids, and schemes of evenly spaced levels have none.

    Raises:
        MpqError: The Gram matrix is not finite, of the wrong shape, or zero (no data reached the layer); or a scale
            does not fit into the spec's scale_dtype.
    """
    blocks, columns = gram.shape[0], matrix.shape[1]
    if gram.shape[1:] != (columns, columns) or len(matrix) % blocks:
        raise MpqError(
            f"statistics of shape {tuple(gram.shape)} do not fit a weight of {tuple(matrix.shape)} (rows, columns); "
            "they are of another layer"
        )
    factor = inverse_factor(gram)  # (B, K, K)
    rows = len(matrix) // blocks
    size = min(specs[0].group_size or columns, columns)
    one_scale = specs[0].granularity == "tensor"
    exponents = None
    if specs[0].record.is_entropy_coded:
        exponents = waterfilled(factor, len(matrix))
        matrix = matrix / step_factors(exponents)
        factor = factor / factors(exponents[1])
    # columns first, so that each is one piece of memory
    weights = matrix.t().reshape(columns, 1, blocks, rows).repeat(1, len(specs), 1, 1)  # (K, W, B, R)
    codes = torch.empty_like(weights)
    scales = weights.new_empty(-(-columns // size), len(specs), blocks, rows)
    zero_points = torch.empty_like(scales)
    for group, first in enumerate(range(0, columns, size)):
        last = min(first + size, columns)
        for index, spec in enumerate(specs):
            part = weights[first:last, index].flatten(1).t()  # (C, size)
            grid = choose_grid((part.reshape(1, 1, -1) if one_scale else part[:, None]).contiguous(), spec)
            scales[group, index], zero_points[group, index] = (
                values.expand(blocks, rows) if one_scale else values.reshape(blocks, rows) for values in grid
            )
        for start in range(first, last, _BLOCK):
            block = slice(start, min(start + _BLOCK, last))
            _round_block(weights, codes, block, scales[group], zero_points[group], factor, specs)
    results = []
    for index in range(len(specs)):
        scale, zero_point = (values[:, index].flatten(1).t() for values in (scales, zero_points))  # (C, G) each
        end = 1 if one_scale else len(scale)
        results.append(Rounded(codes[:, index].flatten(1).t(), scale[:end], zero_point[:end], exponents))
    return results


def _round_block(
    weights: Tensor,
    codes: Tensor,
    block: slice,
    scale: Tensor,
    zero_point: Tensor,
    factor: Tensor,
    specs: Sequence[QuantSpec],
) -> None:
    """Rounds the columns of a block into `codes`, and feeds their errors to all columns of `weights` after them.

    Args:
        weights, codes: (K, W, B, R).
        block: The columns, all of one group.
        scale, zero_point: (W, B, R), those of the group.
        factor: (B, K, K), as `inverse_factor` returns it.
        specs: W of them.
    """
    ranges = torch.tensor([(spec.codes[0], spec.codes[-1]) for spec in specs], dtype=torch.float32)
    q_min, q_max = ranges.to(weights.device)[:, :, None, None].unbind(1)  # (W, 1, 1)
    signs = torch.tensor([spec.is_sign for spec in specs], device=weights.device)[:, None, None]
    steps = factor.permute(1, 2, 0)[:, :, None, :, None]  # (K, K, 1, B, 1)
    inverse_scale = scale.reciprocal()
    errors = weights.new_empty(block.stop - block.start, *weights.shape[1:])
    for column in range(block.start, block.stop):
        values = weights[column]
        rounded = torch.round(values * inverse_scale).add_(zero_point)
        rounded = torch.minimum(torch.maximum(rounded, q_min), q_max)
        codes[column] = torch.where(signs, torch.where(values >= 0, 1.0, -1.0), rounded)
        error = (values - (codes[column] - zero_point) * scale) / steps[column, column]
        weights[column + 1 : block.stop] -= steps[column, column + 1 : block.stop] * error
        errors[column - block.start] = error
    for index in range(len(specs)):  # one at a time, so that each result is the same whatever the others
        fed = torch.einsum("bjk,jbr->kbr", factor[:, block, block.stop :], errors[:, index])
        weights[block.stop :, index] -= fed


def inverse_factor(gram: Tensor) -> Tensor:
    """Returns the upper Cholesky factors (B, K, K), float32, of the inverses of damped Gram matrices.

    Raises:
        MpqError: A Gram matrix is not finite, or zero, or singular although it was damped.
    """
    gram = gram.to(torch.float64)
    diagonal = gram.diagonal(dim1=1, dim2=2)  # (B, K)
    mean = diagonal.mean(dim=1, keepdim=True)
    if not gram.isfinite().all():
        raise MpqError("the statistics of its inputs are not finite; the data or the model's activations are broken")
    if not bool((mean > 0).any()):
        raise MpqError("no calibration data reached it: all of its inputs are zero, or it takes no part in the output")
    damped = gram + torch.diag_embed((DAMPING * mean).expand_as(diagonal))
    damped[mean[:, 0] <= 0] = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper.to(torch.float32)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but missing in torch's __all__
        raise MpqError(f"the statistics of its inputs are singular, although damped: {error}") from None
