"""Mu-law centroids against the formula in plain Python, and rounding to them against a search among all."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq.quantization import grids
from mpq.quantization.grids import choose_grid
from mpq.quantization.mu_law import MUS, choose_centroids, mu_law_centroids, nearest_centroids, nearest_levels
from mpq.quantization.quantizers import dequantize, fake_quantize, quantize
from mpq.quantization.spec import QuantSpec

CENTROIDS = st.lists(st.integers(-128, 127), min_size=1, max_size=40).map(sorted)


def kernel(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.1  # heavy tails


@pytest.mark.parametrize("bits", range(1, 9))
def test_centroids_are_those_of_the_formula(bits: int) -> None:
    for mu in MUS:
        expected = []
        for index in range(2**bits):
            z = -1 + 2 * index / (2**bits - 1)
            warped = z if mu == 0 else math.copysign(((1 + mu) ** abs(z) - 1) / mu, z)
            expected.append(min(max(128 * warped, -128), 127))
        found = mu_law_centroids(bits, mu).tolist()
        assert all(abs(k - value) <= 0.5 + 1e-9 for k, value in zip(found, expected, strict=True))
        assert (found[0], found[-1]) == (-128, 127) and found == sorted(found)
        assert found[1:-1] == [-k for k in found[-2:0:-1]]  # symmetric but for the upper pole


def test_centroids_by_hand() -> None:
    # z = 1/3: sqrt[3](16) = 2.51984, so (2.51984 - 1) / 15 = 0.10132, and x 128 = 12.97
    assert mu_law_centroids(2, 15).tolist() == [-128, -13, 13, 127]
    assert mu_law_centroids(1, 15).tolist() == [-128, 127]


def test_no_mu_is_the_limit_of_small_mu() -> None:
    for bits in range(1, 9):
        assert torch.equal(mu_law_centroids(bits, 0), mu_law_centroids(bits, 1e-12))


def test_mu_draws_the_levels_to_zero() -> None:
    sizes = [int(mu_law_centroids(4, mu).long().abs().sum()) for mu in MUS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(MUS) == 17
    assert (MUS[0], MUS[2], MUS[-1]) == (0, 1, 255)


@given(CENTROIDS, st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30))
def test_the_nearest_of_all(centroids: list[int], values: list[float]) -> None:
    x, z = torch.tensor(values), torch.tensor(centroids, dtype=torch.int8)
    found = nearest_centroids(x, z)
    distances = (x.double()[:, None] - z.double() / 128).abs()
    assert torch.equal(distances.gather(1, found[:, None])[:, 0], distances.amin(dim=1))
    assert torch.equal(nearest_levels(x, z), z[found].float() / 128)


def test_the_upper_one_in_the_middle_between_two() -> None:
    z = torch.tensor([-128, -1, 0, 0, 2], dtype=torch.int8)
    middles = torch.tensor([[-129.0, -1.0], [0.0, 2.0]]) / 256
    assert nearest_centroids(middles, z).tolist() == [[1, 2], [3, 4]]
    assert nearest_centroids(torch.nextafter(middles, torch.tensor(-9.0)), z).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:7"])
@pytest.mark.parametrize("clip", ["none", "mse", "mae", "percentile:95"])
def test_mu_is_the_best_of_all(granularity: str, clip: str) -> None:
    """The error with each mu from `fake_quantize` with given centroids, the search done as its docstring says."""
    for bits, seed in itertools.product((2, 3, 5), range(3)):
        x = kernel(6, 20, seed=seed)
        spec = QuantSpec(bits, "mulaw", granularity, clip)
        candidates = [mu_law_centroids(bits, mu) for mu in MUS]

        def best(scales: torch.Tensor, x=x, spec=spec, candidates=candidates) -> torch.Tensor:
            errors = []
            for one in candidates:
                error = 0.0
                for row, column in itertools.product(range(6), range(20)):
                    group = {"tensor": (0, 0), "channel": (row, 0)}.get(spec.granularity, (row, column // 7))
                    w, scale = float(x[row, column]), float(scales[group])
                    error += min((w - scale * k / 128) ** 2 for k in one.tolist())
                errors.append(error)
            return candidates[errors.index(min(errors))]

        plain = QuantSpec(bits, "mulaw", granularity, clip if clip.startswith("percentile") else "none")
        expected = best(quantize(x, plain, centroids=candidates[0]).scale)
        if clip in ("mse", "mae"):
            expected = best(quantize(x, spec, centroids=expected).scale)
        quantized = quantize(x, spec)
        assert torch.equal(quantized.centroids, expected)
        assert torch.equal(quantized.scale, quantize(x, spec, centroids=expected).scale)


@pytest.mark.parametrize("clip, power", [("mse", 2), ("mae", 1)])
def test_clip_search_finds_the_best_ratio(clip: str, power: int) -> None:
    """Against a plain loop over the candidates, one row at a time, in Python's floats."""
    x = kernel(4, 64, seed=5)
    spec = QuantSpec(3, "mulaw", "channel", clip, scale_dtype="float32")
    quantized = quantize(x, spec)
    levels = [k / 128 for k in quantized.centroids.tolist()]
    for row, values in zip(x.tolist(), dequantize(quantized, spec).tolist(), strict=True):
        errors = [
            sum(min(abs(w - max(map(abs, row)) * ratio * level) for level in levels) ** power for w in row)
            for ratio in grids.CLIP_RATIOS
        ]
        error = sum(abs(w - value) ** power for w, value in zip(row, values, strict=True))
        assert math.isclose(error, min(errors), rel_tol=1e-4) and error < errors[0]  # clipping did pay


def test_one_bit_is_the_mean() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[-1.5, 1.48828125, 1.48828125, 1.48828125], [0.0, 0.0, 0.0, 0.0]])  # 1.5 x 127/128
    for clip in ("none", "mse", "percentile:99"):
        assert torch.equal(fake_quantize(x, QuantSpec(1, "mulaw", "channel", clip)), expected)


def test_what_is_stored() -> None:
    quantized = quantize(kernel(3, 10), QuantSpec(3, "mulaw", "group:4", "none"))
    assert quantized.zero_point is None
    assert quantized.codes.dtype == torch.uint8 and quantized.codes.max() == 7
    assert quantized.centroids.dtype == torch.int8 and quantized.centroids.shape == (8,)
    assert quantized.scale.shape == (3, 3)


def test_values_by_hand() -> None:
    x = torch.tensor([[-0.8, 0.2, 0.31, 0.8]])
    spec = QuantSpec(2, "mulaw", "channel", "none", scale_dtype="float32")
    centroids = torch.tensor([-128, -43, 43, 127], dtype=torch.int8)
    quantized = quantize(x, spec, centroids=centroids)
    assert quantized.codes.tolist() == [[0, 2, 2, 3]]  # 0.31 / 0.8 = 0.3875, of 43/128 = 0.336 and 127/128
    expected = torch.tensor([[-0.8, 0.8 * 43 / 128, 0.8 * 43 / 128, 0.8 * 127 / 128]])
    torch.testing.assert_close(dequantize(quantized, spec), expected, rtol=1e-7, atol=0)


def test_scales_of_a_part_do_not_depend_on_the_rest() -> None:
    x, z = kernel(5, 3, 33), mu_law_centroids(3, 15)
    for clip in ("none", "mse", "mae", "percentile:90"):
        spec = QuantSpec(3, "mulaw", clip=clip)
        whole, _ = choose_grid(x, spec, z)
        assert torch.equal(choose_grid(x[2:3, 1:2], spec, z)[0], whole[2:3, 1:2])


def test_outliers_ask_for_a_larger_mu_than_even_weights() -> None:
    even, tailed = torch.linspace(-1, 1, 999)[None, None], kernel(1, 1, 999)
    sums = [choose_centroids([x], QuantSpec(4, "mulaw", clip="none")).long().abs().sum() for x in (even, tailed)]
    assert sums[0] == mu_law_centroids(4, 0).long().abs().sum() > 1.5 * sums[1]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_whose_squares_are_no_floats(size: float) -> None:
    x = kernel(4, 30) * size
    spec = QuantSpec(8, "mulaw", "channel", "none", scale_dtype="float32")
    assert float((fake_quantize(x, spec) - x).abs().max()) <= 0.1 * float(x.abs().max())
