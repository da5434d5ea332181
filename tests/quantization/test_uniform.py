"""Evenly spaced levels against a search among all of them; test_quantizers.py has torch's operators as witnesses."""

import torch
from torch import Tensor

from mpq.quantization.grids import choose_grid, nearest_codes
from mpq.quantization.levels import levels_of
from mpq.quantization.spec import QuantSpec


def groups_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.1 + 0.02


def test_codes_are_the_closest_of_all_levels() -> None:
    groups = groups_of(4, 2, 50, seed=1)
    for bits in range(2, 9):
        for scheme in ("symmetric", "asymmetric"):
            spec = QuantSpec(bits, scheme=scheme, clip="percentile:80")  # many weights lie outside
            scale, zero_point = choose_grid(groups, spec)
            q_min, q_max = spec.codes[0], spec.codes[-1]
            codes = torch.arange(q_min, q_max + 1, dtype=torch.float64)
            levels = (codes - zero_point[..., None].double()) * scale[..., None].double()  # (C, G, P)
            distance = (groups[..., None].double() - levels[..., None, :]).abs()  # (C, G, size, P)
            got = nearest_codes(groups, scale, zero_point, spec)
            own = distance.gather(-1, (got - q_min).long()[..., None])[..., 0]
            torch.testing.assert_close(own, distance.amin(dim=-1), rtol=1e-4, atol=1e-9)


def test_rounded_weights_are_their_codes_less_the_zero_point() -> None:
    groups = groups_of(4, 2, 50, seed=2)
    for bits in (1, 2, 5):
        for scheme in ("symmetric", "asymmetric"):
            spec = QuantSpec(bits, scheme)
            scale, zero_point = choose_grid(groups, spec)
            rounded = levels_of(spec).rounded(groups, scale, zero_point, spec, None)
            assert torch.equal(rounded, nearest_codes(groups, scale, zero_point, spec) - zero_point[..., None])


def test_signs_of_zeros_are_positive() -> None:
    spec = QuantSpec(1, "symmetric")
    codes = nearest_codes(torch.tensor([[[-0.1, 0.0, 0.1]]]), torch.ones(1, 1), torch.zeros(1, 1), spec)
    assert codes.tolist() == [[[-1.0, 1.0, 1.0]]]
