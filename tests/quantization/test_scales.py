"""Ranges against numpy, and scales at the ends of their types."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization.grids import choose_grid
from mpq.quantization.scales import normalised, range_around_zero, storable_scale, stored_scale
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


def test_ranges_around_zero_are_numpys() -> None:
    groups = groups_of(3, 2, 40)
    for clip, share in (("none", 1.0), ("percentile:75", 0.75)):
        low, high = range_around_zero(groups, QuantSpec(4, "symmetric", clip=clip))
        np.testing.assert_allclose(high.numpy(), np.quantile(np.abs(groups.numpy()), share, axis=-1), rtol=1e-6)
        assert torch.equal(low, -high)


def test_a_scale_beyond_half_precision_is_refused_and_the_smallest_is_not_zero() -> None:
    for scheme in ("symmetric", "asymmetric"):
        with pytest.raises(MpqError, match="does not fit into float16; use scale_dtype float32"):
            choose_grid(torch.tensor([[[-2e7, 2e7]]]), QuantSpec(8, scheme=scheme, clip="none"))
        for dtype, smallest in (("float16", 2.0**-24), ("float32", 2.0**-126)):
            spec = QuantSpec(4, scheme=scheme, clip="none", scale_dtype=dtype)
            assert float(choose_grid(torch.zeros(1, 1, 5), spec)[0]) == smallest


def test_half_precision_scales_round_up_where_digits_are_few() -> None:
    scale = torch.tensor([2.0**-24 * 1.25, 2.0**-14 * (1 + 2**-12), 0.0])
    stored = stored_scale(scale, QuantSpec(4))
    assert stored.tolist() == [2.0**-23, 2.0**-14, 0.0]
    assert storable_scale(scale, QuantSpec(4)).tolist() == [2.0**-23, 2.0**-14, 2.0**-24]


def test_a_group_of_zeros_is_zero_in_units_of_its_scale() -> None:
    assert normalised(torch.zeros(1, 2, 3), torch.tensor([[0.0, 2.0]])).tolist() == [[[0.0] * 3] * 2]
