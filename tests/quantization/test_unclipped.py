"""A grid without clipping: its step, its nominal rate, its codes."""

import math

import pytest
import torch

from mpq.errors import MpqError
from mpq.quantization.quantizers import dequantize, fake_quantize, quantize
from mpq.quantization.spec import QuantSpec


def entropy_bits(codes: torch.Tensor) -> float:
    """Returns the empirical entropy of codes, bits a code."""
    _, counts = codes.unique(return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum())


@pytest.mark.parametrize("rate", [2.5, 3, 4.25])
def test_the_nominal_rate_of_a_gaussian_is_the_entropy_of_its_codes(rate: float) -> None:
    weight = torch.randn(1000, 300, generator=torch.Generator().manual_seed(1)) * 0.02
    codes = quantize(weight, QuantSpec(rate, "entropy")).codes
    step = 2 ** (math.log2(2 * math.pi * math.e) / 2 - rate)
    # a coarse step adds its own variance, step^2 / 12
    assert abs(entropy_bits(codes) - rate - 0.5 * math.log2(1 + step**2 / 12)) < 0.003


def test_no_weight_is_cut_off() -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    weight[3, 5] = 400.0
    spec = QuantSpec(3, "entropy")
    stored = quantize(weight, spec)
    assert stored.codes.dtype == torch.int32 and int(stored.codes.max()) > 127
    error = (dequantize(stored, spec) - weight).abs()
    assert float(error.max()) <= float(stored.scale) / 2 * (1 + 1e-5) and stored.scale.shape == (1, 1)
    assert torch.equal(stored.scale, stored.scale.half().float())  # it can be stored


def test_the_step_halves_with_each_bit() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    coarse, fine = (float(quantize(weight, QuantSpec(rate, "entropy")).scale) for rate in (2, 5))
    assert coarse / fine == pytest.approx(8, rel=2e-3)  # float16


def test_degenerate_weights() -> None:
    for weight in (torch.zeros(3, 4), torch.zeros(1), torch.tensor([[2.0]]), torch.full((2, 2), 1e-12)):
        rounded = fake_quantize(weight, QuantSpec(4, "entropy"))
        assert rounded.shape == weight.shape and bool(rounded.isfinite().all())
    assert float(fake_quantize(torch.tensor([[2.0]]), QuantSpec(6, "entropy"))) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("rate", [0, 0.05, 8.5, 2.0001, True, "2", float("nan")])
def test_rates_that_there_are_not(rate: float) -> None:
    with pytest.raises(MpqError, match=r"bits: expected a rate from 0\.1 to 8 bits a weight, with three decimals"):
        QuantSpec(rate, "entropy")


def test_other_options_than_its_own_are_refused() -> None:
    assert QuantSpec(2.0, "entropy").bits == 2 and isinstance(QuantSpec(2.0, "entropy").bits, int)
    for options in ({"granularity": "channel"}, {"clip": "mse"}):
        with pytest.raises(MpqError, match=r"the scheme entropy has .* alone, got .*; leave it out"):
            QuantSpec(3, "entropy", **options)
    with pytest.raises(MpqError, match=r"bits: expected a whole number from 1 to 8, got 2\.5"):
        QuantSpec(2.5, "asymmetric")
