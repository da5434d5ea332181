"""Quantizers against torch's own fake-quantize and observers, brute force, and hand-computed values."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.quantization.grids import CLIP_RATIOS, scale_shape
from mpq.quantization.quantizers import dequantize, fake_quantize, quantize
from mpq.quantization.spec import QuantSpec

SCHEMES = ("symmetric", "asymmetric")  # mulaw has tests of its own, in test_mu_law.py
ALL_SCHEMES = (*SCHEMES, "mulaw")
GRANULARITIES = ("tensor", "channel", "group:4", "group:7", "group:1000")
SHAPES = ((3, 10), (4, 1, 5), (2, 3, 3, 3), (5,))


def weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2 + 0.03


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_to_torch_fake_quantize(bits: int, scheme: str) -> None:
    if bits == 1 and scheme == "symmetric":
        return  # sign(w) * mean|w| has no counterpart in torch; see test_one_bit_symmetric
    spec = QuantSpec(bits, scheme, "channel", "none", scale_dtype="float32")
    x = weight((6, 40))
    q_min, q_max = spec.codes[0], spec.codes[-1]
    quantized = quantize(x, spec)
    zero_point = torch.zeros(6, dtype=torch.int32)
    if quantized.zero_point is not None:
        zero_point = quantized.zero_point[:, 0].to(torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, quantized.scale[:, 0], zero_point, 0, q_min, q_max)
    assert torch.equal(fake_quantize(x, spec), expected)
    spec = QuantSpec(bits, scheme, "tensor", "none", scale_dtype="float32")
    quantized = quantize(x, spec)
    zero_point = 0 if quantized.zero_point is None else int(quantized.zero_point)
    expected = torch.fake_quantize_per_tensor_affine(x, float(quantized.scale), zero_point, q_min, q_max)
    assert torch.equal(fake_quantize(x, spec), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*:UserWarning")
@pytest.mark.parametrize("bits", range(1, 9))
def test_asymmetric_parameters_equal_those_of_torchs_observer(bits: int) -> None:
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    x = weight((6, 40), seed=2)
    observer = PerChannelMinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=2**bits - 1
    )
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    quantized = quantize(x, QuantSpec(bits, "asymmetric", "channel", "none", scale_dtype="float32"))
    torch.testing.assert_close(quantized.scale[:, 0], scale, rtol=1e-6, atol=0)
    assert quantized.zero_point is not None
    assert torch.equal(quantized.zero_point[:, 0].long(), zero_point.long())


def test_symmetric_step_spans_the_weights() -> None:
    x = torch.tensor([[-0.6, 0.3, 0.1, 0.0]])
    quantized = quantize(x, QuantSpec(3, "symmetric", "channel", "none", scale_dtype="float32"))
    torch.testing.assert_close(quantized.scale, torch.tensor([[0.2]]))  # max|w| / (2^2 - 1)
    assert quantized.codes.tolist() == [[-3, 2, 0, 0]]  # 0.3 / 0.2 = 1.5 rounds to the even 2, 0.1 / 0.2 = 0.5 to 0


def test_two_bit_symmetric_has_three_levels() -> None:
    x = weight((4, 200))
    assert set(quantize(x, QuantSpec(2, "symmetric")).codes.unique().tolist()) == {-1, 0, 1}


def test_one_bit_symmetric() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[-1.5, 1.5, 1.5, 1.5], [0.0, 0.0, 0.0, 0.0]])  # sign(w) * mean|w|
    assert torch.equal(fake_quantize(x, QuantSpec(1, "symmetric", "channel")), expected)


@pytest.mark.parametrize("clip", ["none", "mse", "mae", "percentile:99"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_codes_scales_and_zero_points_keep_their_promises(scheme: str, granularity: str, clip: str) -> None:
    for bits, shape in itertools.product((1, 2, 3, 8), SHAPES):
        spec = QuantSpec(bits, scheme, granularity, clip)
        x = weight(shape)
        quantized = quantize(x, spec)
        q_min, q_max = spec.codes[0], spec.codes[-1]
        assert quantized.codes.shape == x.shape
        assert q_min <= int(quantized.codes.min()) and int(quantized.codes.max()) <= q_max
        assert tuple(quantized.scale.shape) == scale_shape(shape, spec)
        assert torch.equal(quantized.scale.half().float(), quantized.scale)
        if quantized.zero_point is not None:
            assert quantized.zero_point.dtype == torch.uint8 and int(quantized.zero_point.max()) <= q_max
        assert fake_quantize(x, spec).shape == x.shape and fake_quantize(x, spec).dtype == torch.float32


def test_groups_are_quantized_on_their_own() -> None:
    x = weight((3, 10))
    whole = fake_quantize(x, QuantSpec(3, granularity="group:4"))
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        part = fake_quantize(x[:, start:stop].contiguous(), QuantSpec(3, granularity="channel"))
        assert torch.equal(whole[:, start:stop], part)


@pytest.mark.parametrize("clip, power", [("mse", 2), ("mae", 1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_clip_search_finds_the_best_ratio(scheme: str, clip: str, power: int) -> None:
    """Against a plain loop over the candidates, one row at a time, in Python's floats."""
    x = weight((4, 64), seed=5) ** 3  # heavy tails, so that clipping pays
    bits = 3
    got = fake_quantize(x, QuantSpec(bits, scheme, "channel", clip, scale_dtype="float32"))
    for row, quantized in zip(x.tolist(), got.tolist(), strict=True):
        errors = []
        for ratio in CLIP_RATIOS:
            if scheme == "symmetric":
                scale, zero, q_min, q_max = max(map(abs, row)) * ratio / 3, 0, -3, 3
            else:
                low, high = min(*row, 0.0) * ratio, max(*row, 0.0) * ratio
                scale, q_min, q_max = (high - low) / 7, 0, 7
                zero = round(-low / scale)
            levels = [(min(max(round(w / scale) + zero, q_min), q_max) - zero) * scale for w in row]
            errors.append(sum(abs(w - level) ** power for w, level in zip(row, levels, strict=True)))
        error = sum(abs(w - level) ** power for w, level in zip(row, quantized, strict=True))
        assert math.isclose(error, min(errors), rel_tol=1e-4)
        assert error < errors[0]  # clipping did pay


def test_percentile_is_numpys() -> None:
    x = weight((3, 50), seed=8)
    spec = QuantSpec(8, "symmetric", "channel", "percentile:90", scale_dtype="float32")
    expected = torch.quantile(x.abs(), 0.9, dim=1) / 127
    torch.testing.assert_close(quantize(x, spec).scale[:, 0], expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from(SCHEMES),
    st.sampled_from(GRANULARITIES),
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
)
def test_quantizing_twice_changes_nothing_more_and_error_is_within_a_step(bits, scheme, granularity, values) -> None:
    x = torch.tensor([values])
    spec = QuantSpec(bits, scheme, granularity, "none", scale_dtype="float32")
    quantized = quantize(x, spec)
    once = dequantize(quantized, spec)
    if bits > 1:  # every weight lies within the range (its zero point rounded), so at most one step away
        steps = quantized.scale.repeat_interleave(spec.group_size or len(values), dim=1)[:, : len(values)]
        assert bool(((once - x).abs() <= 1.01 * steps + 1e-6).all())
    assert bool((once[x == 0] == 0).all()) or (bits == 1 and scheme == "symmetric")


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_zeros_stay_zeros(scheme: str, bits: int) -> None:
    for clip in ("none", "mse", "percentile:99"):
        assert bool((fake_quantize(torch.zeros(3, 9), QuantSpec(bits, scheme, "group:4", clip)) == 0).all())


def test_error_falls_with_bits() -> None:
    x = weight((16, 128), seed=4)
    for scheme in ALL_SCHEMES:
        errors = [float((fake_quantize(x, QuantSpec(bits, scheme)) - x).square().sum()) for bits in range(1, 9)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_no_tiny_weight_is_cut_off_by_half_precision_scales(scheme: str, size: float) -> None:
    x = weight((4, 65)) * size
    spec = QuantSpec(8, scheme, "group:5", "none")
    quantized = quantize(x, spec)
    scale = quantized.scale.repeat_interleave(5, dim=1)
    if scheme == "mulaw":
        widest = int(quantized.centroids.long().diff().max())
        assert bool(((fake_quantize(x, spec) - x).abs() <= (widest / 2 + 1) / 128 * scale).all())  # the pole is 127/128
        return
    assert bool(((fake_quantize(x, spec) - x).abs() <= 0.57 * scale).all())  # half a step, and float16's 2^-11 of 127


def test_a_group_larger_than_any_row() -> None:
    x = weight((3, 10))
    assert torch.equal(
        fake_quantize(x, QuantSpec(4, granularity="group:99999999999999999999")),
        fake_quantize(x, QuantSpec(4, granularity="channel")),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(MpqError, match="finite"):
        quantize(torch.tensor([[1.0, bad]]), QuantSpec(4))


def test_too_large_for_half_precision_is_refused() -> None:
    with pytest.raises(MpqError, match="scale_dtype float32"):
        quantize(torch.tensor([[1e9, -1e9]]), QuantSpec(4))
    assert float(fake_quantize(torch.tensor([[1e9, -1e9]]), QuantSpec(4, scale_dtype="float32")).max()) > 9e8


def test_empty_is_refused() -> None:
    with pytest.raises(MpqError, match="at least one element"):
        quantize(torch.zeros(3, 0), QuantSpec(4))
