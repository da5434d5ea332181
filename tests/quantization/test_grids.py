"""What test_quantizers.py does not reach of the grids: the pieces of the search, and shapes."""

import pytest
import torch
from torch import Tensor

from mpq.quantization import grids
from mpq.quantization.grids import choose_grid, matrix_shape
from mpq.quantization.spec import QuantSpec


def groups_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.1 + 0.02


@pytest.mark.parametrize("at_once", [1, 700, 10**9])
@pytest.mark.parametrize("clip", ["mse", "mae"])
def test_the_search_does_not_depend_on_its_pieces_or_on_other_groups(
    clip: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_of(5, 3, 33)
    for scheme in ("symmetric", "asymmetric"):
        spec = QuantSpec(3, scheme=scheme, clip=clip)
        whole = choose_grid(groups, spec)
        monkeypatch.setattr(grids, "_AT_ONCE", at_once)
        for part, other in zip(choose_grid(groups, spec), whole, strict=True):
            assert torch.equal(part, other) and part.shape == (5, 3)
        scale, zero_point = choose_grid(groups[2:3, 1:2], spec)
        assert scale.item() == whole[0][2, 1].item() and zero_point.item() == whole[1][2, 1].item()
        monkeypatch.undo()


def test_matrix_shapes_by_hand() -> None:
    channel, tensor = QuantSpec(4, granularity="channel"), QuantSpec(4, granularity="tensor")
    assert matrix_shape((6, 4, 3), channel) == (6, 12) and matrix_shape((6, 4, 3), tensor) == (1, 72)
    assert matrix_shape((7,), channel) == matrix_shape((7,), tensor) == (1, 7)
