"""Steps that differ from row to row and from column to column: finer where a layer hears its inputs better.

For a layer y = W x, rounding with feedback (`mpq.quantization.gptq`) leaves an output error that is the sum over the
columns j of (step_j / U_jj)^2 / 12, U the upper Cholesky factor of the inverse of the inputs' Gram matrix. Codes take
-log2(step_j) bits more or less, so for a given number of bits the error is least where step_j is proportional to U_jj
("waterfilling": WaterSIC, Lifar et al. 2026, arXiv 2603.04956). A grouped convolution has a Gram matrix for each of its
groups of rows; the mean level of each is the step of its rows.

The step of weight (i, j) is scale * 2^((row_i + column_j) / 4), so the exponents are small whole numbers.

Legend: C rows, K columns, B Gram matrices, as in `mpq.quantization.gptq`.
"""

import math

import torch
from torch import Tensor

OCTAVE = 4
"""Steps of an exponent in a factor of two."""
REACH, ROW_REACH = 40, 8
"""The largest exponent of a column and of a row, and the smallest negated: factors of 2^10 and of 4."""

_QUARTERS = (1.0, math.sqrt(math.sqrt(2.0)), math.sqrt(2.0), math.sqrt(2.0) * math.sqrt(math.sqrt(2.0)))


def factors(exponents: Tensor) -> Tensor:
    """Returns 2^(exponent / 4), float32, of whole exponents of any shape, from -2 REACH to 2 REACH.

    They are the same on every machine: square roots and products are correctly rounded everywhere, powers are not.

    >>> factors(torch.tensor([-4, 0, 2, 8]))
    tensor([0.5000, 1.0000, 1.4142, 4.0000])
    """
    return _table().to(exponents.device)[exponents.to(torch.int64) + 2 * REACH]


def _table() -> Tensor:
    """Returns the (4 REACH + 1,) float32 factors of all exponents."""
    values = [math.ldexp(_QUARTERS[k % OCTAVE], k // OCTAVE) for k in range(-2 * REACH, 2 * REACH + 1)]
    return torch.tensor(values, dtype=torch.float64).to(torch.float32)


def step_factors(exponents: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the (C, K) float32 steps, in units of the scale, of exponents of rows (C,) and of columns (K,)."""
    rows, columns = (one.to(torch.int64) for one in exponents)
    return factors(rows[:, None] + columns[None, :])


def waterfilled(factor: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the exponents of rows (C,) and of columns (K,), int8, each with a mean near zero.

    Args:
        factor: (B, K, K), as `mpq.quantization.gptq.inverse_factor` returns it.
        rows: C, a multiple of B; the first C / B rows go with the first matrix, and so on.
    """
    levels = factor.diagonal(dim1=1, dim2=2).to(torch.float64).log2()  # (B, K)
    of_rows = levels.mean(dim=1).repeat_interleave(rows // len(factor))  # (C,)
    return _whole(of_rows, ROW_REACH), _whole(levels.mean(dim=0), REACH)


def _whole(levels: Tensor, reach: int) -> Tensor:
    """Returns levels in octaves as exponents around their mean."""
    exponents = torch.round(OCTAVE * (levels - levels.mean())).clamp(-reach, reach)
    return exponents.to(torch.int8)
