"""The semi-orthogonal step against numpy."""

import math

import numpy as np
import pytest
import torch

from mpq.models.conformer import ConformerEncoder, ConformerOptions
from mpq.training.orthogonal import constrained_factors, orthogonality_error, semi_orthogonal_step


def near_orthogonal(rank: int, other: int, noise: float, scale: float = 2.5) -> torch.Tensor:
    random = np.random.default_rng(4)
    q, _ = np.linalg.qr(random.normal(size=(other, rank)))
    return torch.from_numpy(scale * q.T + noise * random.normal(size=(rank, other)))


def test_semi_orthogonal_step_by_hand() -> None:
    """P = M M', c^2 = tr(P P') / tr(P), M <- M - (P - c^2 I) M / (2 c^2), near the goal."""
    matrix = near_orthogonal(4, 7, 0.02)
    m = matrix.numpy().copy()
    p = m @ m.T
    c2 = np.trace(p @ p.T) / np.trace(p)
    expected = m - (p - c2 * np.eye(4)) @ m / (2 * c2)
    semi_orthogonal_step(matrix)
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("squares", "length"), [([1.0] * 3 + [1.1], 1.0), ([1.0] * 3 + [1.6], 0.5), ([1.0] * 99 + [11.0], 0.25)]
)
def test_the_step_is_shorter_where_the_singular_values_differ(squares: list[float], length: float) -> None:
    """As in Kaldi (ConstrainOrthonormalInternal): where tr(P P) R / tr(P)^2 is above 1.02, and above 1.1.

    A whole step would turn the last one of 100 into its negative, times 1.2.
    """
    random, values = np.random.default_rng(2), np.sqrt(squares)
    left, _, right = np.linalg.svd(random.normal(size=(len(values), 120)), full_matrices=False)
    matrix = torch.from_numpy(left @ np.diag(values) @ right)
    semi_orthogonal_step(matrix)
    c2 = np.square(squares).sum() / np.sum(squares)
    expected = values * (1 - length * (values**2 / c2 - 1) / 2)
    np.testing.assert_allclose(left.T @ matrix.numpy() @ right.T, np.diag(expected), atol=1e-10)
    assert (expected > 0).all()


def test_semi_orthogonal_step_converges_quadratically() -> None:
    matrix = near_orthogonal(6, 10, 0.01)
    errors = []
    for _ in range(3):
        errors.append(orthogonality_error(matrix))
        semi_orthogonal_step(matrix)
    assert 1e-4 < errors[0] < 0.1 and errors[1] < 2 * errors[0] ** 2 and errors[2] < 2 * errors[1] ** 2


def test_semi_orthogonal_steps_reach_the_goal_from_a_gaussian_and_keep_its_size() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 32)))
    norm = matrix.norm()
    assert orthogonality_error(matrix) > 0.3
    for _ in range(60):
        semi_orthogonal_step(matrix)
    assert orthogonality_error(matrix) < 1e-3
    assert 0.5 < float(matrix.norm() / norm) < 2  # c is free: it floats, and neither vanishes nor explodes
    gram = (matrix @ matrix.T).numpy()
    np.testing.assert_allclose(gram, np.eye(20) * np.trace(gram) / 20, atol=1e-2 * np.trace(gram) / 20)


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_a_badly_conditioned_matrix_does_not_blow_up(condition: float) -> None:
    random = np.random.default_rng(1)
    left, _, right = np.linalg.svd(random.normal(size=(12, 20)), full_matrices=False)
    matrix = torch.from_numpy(left @ np.diag(np.geomspace(1, 1 / condition, 12)) @ right)
    norm, errors = float(matrix.norm()), []
    for _ in range(400):
        semi_orthogonal_step(matrix)
        assert matrix.isfinite().all() and float(matrix.norm()) < 4 * norm
        errors.append(orthogonality_error(matrix))
    assert errors[-1] < 1e-3


def test_orthogonality_error_by_hand() -> None:
    """P = diag(1, 4), c^2 = 17 / 5: ||diag(5/17 - 1, 20/17 - 1)|| / sqrt(2)."""
    matrix = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert orthogonality_error(matrix) == pytest.approx(math.hypot(12 / 17, 3 / 17) / math.sqrt(2))


def factored_encoder(rank: int = 3) -> ConformerEncoder:
    return ConformerEncoder(
        ConformerOptions(
            features=8,
            layers=2,
            width=8,
            heads=2,
            ffn_width=16,
            kernel_size=3,
            subsampling="striding",
            subsampling_factor=4,
            subsampling_channels=2,
            ffn_rank=rank,
        )
    )


@pytest.mark.parametrize(
    ("placing", "expected"),
    [
        ("SLLS", ["linear1.inner", "linear2.outer"]),
        ("SLLL", ["linear1.inner"]),
        ("LSSL", ["linear1.outer", "linear2.inner"]),
        ("LLLL", []),
    ],
)
def test_constrained_factors(placing: str, expected: list[str]) -> None:
    encoder = factored_encoder()
    names = {parameter.data_ptr(): name for name, parameter in encoder.named_parameters()}
    found = constrained_factors(encoder, placing)
    assert [names[factor.data_ptr()] for factor in found] == [
        f"layers.{block}.{module}.{factor}.weight"
        for block in range(2)
        for module in ("feed_forward1", "feed_forward2")
        for factor in expected
    ]
    for factor in found:
        assert factor.shape[0] == 3 and factor.shape[1] in (8, 16)


def test_a_step_through_the_view_changes_the_module() -> None:
    encoder = factored_encoder()
    weight = encoder.layers[0].feed_forward1.linear2.outer.weight  # (8, 3)
    before = weight.detach().clone()
    for _ in range(80):
        semi_orthogonal_step(constrained_factors(encoder, "LLLS")[0])
    assert not torch.equal(before, weight)
    gram = weight.detach().T @ weight.detach()
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(3), rtol=0, atol=1e-3)


def test_modules_that_are_not_factored_have_nothing_to_constrain() -> None:
    assert constrained_factors(factored_encoder(rank=0), "SSSS") == []
