"""What test_quantizers.py does not reach of the grids: asymmetric percentiles, pieces of the search, float16's ends."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization import grids
from mpq.quantization.grids import choose_grid, matrix_shape, nearest_codes
from mpq.quantization.spec import QuantSpec


def groups_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.1 + 0.02


def test_asymmetric_percentiles_are_numpys_and_zero_is_inside() -> None:
    groups = groups_of(3, 2, 40)
    groups[1, 1] = groups[1, 1].abs() + 0.1  # all positive: the range starts at zero all the same
    scale, zero_point = choose_grid(groups, QuantSpec(8, clip="percentile:90", scale_dtype="float32"))
    low = np.quantile(groups.numpy(), 0.1, axis=-1).clip(max=0)
    high = np.quantile(groups.numpy(), 0.9, axis=-1).clip(min=0)
    np.testing.assert_allclose(scale.numpy(), (high - low) / 255, rtol=1e-5)
    np.testing.assert_allclose(zero_point.numpy(), np.round(-low / scale.numpy()))
    assert float(zero_point[1, 1]) == 0


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


def test_codes_are_the_closest_of_all_levels() -> None:
    groups = groups_of(4, 2, 50, seed=1)
    for bits in range(2, 9):
        for scheme in ("symmetric", "asymmetric"):
            spec = QuantSpec(bits, scheme=scheme, clip="percentile:80")  # many weights lie outside
            scale, zero_point = choose_grid(groups, spec)
            q_min, q_max = grids.code_range(spec)
            codes = torch.arange(q_min, q_max + 1, dtype=torch.float64)
            levels = (codes - zero_point[..., None].double()) * scale[..., None].double()  # (C, G, P)
            distance = (groups[..., None].double() - levels[..., None, :]).abs()  # (C, G, size, P)
            got = nearest_codes(groups, scale, zero_point, spec)
            own = distance.gather(-1, (got - q_min).long()[..., None])[..., 0]
            torch.testing.assert_close(own, distance.amin(dim=-1), rtol=1e-4, atol=1e-9)


def test_a_scale_beyond_half_precision_is_refused_and_the_smallest_is_not_zero() -> None:
    for scheme in ("symmetric", "asymmetric"):
        with pytest.raises(MpqError, match="does not fit into float16; use scale_dtype float32"):
            choose_grid(torch.tensor([[[-2e7, 2e7]]]), QuantSpec(8, scheme=scheme, clip="none"))
        for dtype, smallest in (("float16", 2.0**-24), ("float32", 2.0**-126)):
            spec = QuantSpec(4, scheme=scheme, clip="none", scale_dtype=dtype)
            assert float(choose_grid(torch.zeros(1, 1, 5), spec)[0]) == smallest


def test_matrix_shapes_by_hand() -> None:
    channel, tensor = QuantSpec(4, granularity="channel"), QuantSpec(4, granularity="tensor")
    assert matrix_shape((6, 4, 3), channel) == (6, 12) and matrix_shape((6, 4, 3), tensor) == (1, 72)
    assert matrix_shape((7,), channel) == matrix_shape((7,), tensor) == (1, 7)
