"""Factors of low-rank matrices kept nearly semi-orthogonal during training (Povey et al. 2018, TDNN-F).

A placing is four letters, for the factors in the order in which data pass them: inner and outer of a module's first
matrix, inner and outer of its second; S is semi-orthogonal, L free. "SLLS" is the paper's best (Li et al. 2023,
Table 1), "LLLL" leaves all free.
"""

import torch
from torch import Tensor

from mpq.models.conformer import ConformerEncoder, FactoredLinear


def constrained_factors(encoder: ConformerEncoder, placing: str) -> list[Tensor]:
    """Returns the factors that a placing constrains, as (rank, other) views: a change of a view changes the weight."""
    factors: list[Tensor] = []
    for block in encoder.layers:
        for name in ("feed_forward1", "feed_forward2"):
            first, second = getattr(block, name).linear1, getattr(block, name).linear2
            for linear, inner, outer in ((first, placing[0], placing[1]), (second, placing[2], placing[3])):
                if isinstance(linear, FactoredLinear):
                    factors += [linear.inner.weight] if inner == "S" else []  # (rank, inputs)
                    factors += [linear.outer.weight.T] if outer == "S" else []  # (rank, outputs)
    return factors


@torch.no_grad()
def semi_orthogonal_step(matrix: Tensor) -> None:
    """Moves a matrix M, in place, towards M M' = c^2 I, where c^2 = tr(P P') / tr(P), P = M M'.

    The step is M -= (P - c^2 I) M / (2 c^2), which converges quadratically near the goal. Far from it, where the
    singular values differ much, it could overshoot; there it is a half or a quarter as long, by the ratio of the mean
    square to the squared mean of P's eigenvalues, as in Kaldi.

    Args:
        matrix: (R, K), R <= K, the rank first.
    """
    p = matrix @ matrix.T  # (R, R)
    trace, square = p.trace(), p.square().sum()
    scale = square / trace
    ratio = float(square * len(p) / trace.square())
    speed = 0.5 if ratio <= 1.02 else 0.25 if ratio <= 1.1 else 0.125
    p.diagonal().sub_(scale)
    matrix.sub_(speed / scale * (p @ matrix))


def orthogonality_error(matrix: Tensor) -> float:
    """Returns ||P / c^2 - I|| / sqrt(R): 0 for a semi-orthogonal (R, K) matrix."""
    p = matrix @ matrix.T
    scale = p.square().sum() / p.trace()
    return float((p / scale - torch.eye(len(p), device=p.device)).norm() / len(p) ** 0.5)
