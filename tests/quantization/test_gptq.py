"""GPTQ against least squares, the textbook's explicit inverse, rounding to nearest, and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.quantization import gptq as module
from mpq.quantization.grids import choose_grid, nearest_codes
from mpq.quantization.quantizers import dequantize, quantize, quantize_widths
from mpq.quantization.spec import QuantSpec

SCHEMES = ("symmetric", "asymmetric")
WIDTHS = range(1, 9)


def spec_of(bits: int = 3, **options: str) -> QuantSpec:
    return QuantSpec(bits, **({"granularity": "channel", "clip": "none", "rounding": "gptq"} | options))


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2 + 0.03


def correlated(blocks: int, columns: int, seed: int = 1) -> Tensor:
    """Returns (B, K, K) Gram matrices of inputs that go together, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(blocks, 3 * columns, columns, generator=generator).cumsum(dim=2)
    inputs = inputs * torch.rand(blocks, 1, columns, generator=generator)
    return inputs.transpose(1, 2) @ inputs


def damped(gram: Tensor) -> np.ndarray:
    """Returns one (K, K) Gram matrix as the rounding sees it."""
    matrix = gram.double().numpy()
    return matrix + module.DAMPING * matrix.diagonal().mean() * np.eye(len(matrix))


def output_error(error: Tensor, gram: Tensor) -> float:
    """Returns tr(D H D') of (C, K) errors of B blocks of rows."""
    parts = error.double().reshape(len(gram), -1, gram.shape[-1])
    return float(torch.einsum("brj,bjk,brk->", parts, gram.double(), parts))


def gptq(matrix: Tensor, specs: list[QuantSpec], gram: Tensor) -> list[tuple[Tensor, ...]]:
    """Returns codes, scales and zero points."""
    return [(one.codes, one.scale, one.zero_point) for one in module.gptq(matrix, specs, gram)]


def nearest(matrix: Tensor, specs: list[QuantSpec]) -> list[tuple[Tensor, ...]]:
    plain = [quantize(matrix, replace(spec, rounding="nearest")) for spec in specs]
    zeros = [torch.zeros_like(one.scale) if one.zero_point is None else one.zero_point.float() for one in plain]
    return [(one.codes.float(), one.scale, zero) for one, zero in zip(plain, zeros, strict=True)]


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_each_step_is_optimal(matrix: Tensor, spec: QuantSpec, gram: Tensor, result: tuple[Tensor, ...]) -> None:
    """Checks a result without the method's recursion: no inverse, no Cholesky factor, no order of updates.

    What a column is before it is rounded follows from the codes of the columns before it alone: with those fixed, the
    weights after them minimise tr(D H D'), a least-squares problem. The code must be the level next to that value, and
    a group's range that of those values when the group is reached. Float64; the tolerances are for mpq's float32.
    """
    codes, scale, zero = (part.double().numpy() for part in result)
    rows, columns = matrix.shape
    size = min(spec.group_size or columns, columns)
    per_column = np.minimum(np.arange(columns) // size, scale.shape[1] - 1)
    scale, zero = (np.broadcast_to(part, (rows, part.shape[1]))[:, per_column] for part in (scale, zero))  # (C, K)
    original, errors = matrix.double().numpy(), (codes - zero) * scale - matrix.double().numpy()
    q_min, q_max = spec.codes[0], spec.codes[-1]
    for block in range(len(gram)):
        own = slice(block * rows // len(gram), (block + 1) * rows // len(gram))
        H = damped(gram[block])
        for j in range(columns):
            made_up = np.linalg.solve(H[j:, j:], H[j:, :j] @ errors[own, :j].T).T if gram[block].any() else 0
            best = original[own, j:] - made_up  # (R, K - j)
            if spec.is_sign:
                assert (codes[own, j] * best[:, 0] >= -1e-4).all()
            else:
                ideal = (best[:, 0] / scale[own, j] + zero[own, j]).clip(q_min, q_max)
                assert abs(codes[own, j] - ideal).max() <= 0.51
            if j % size == 0 and spec.granularity != "tensor":
                group = best[:, : min(size, columns - j)]
                low, high = group.min(axis=1).clip(max=0), group.max(axis=1).clip(min=0)
                if spec.is_sign:
                    step = abs(group).mean(axis=1)
                elif spec.scheme == "symmetric":
                    step = abs(group).max(axis=1) / q_max
                else:
                    step = (high - low) / q_max
                    assert abs((-low / scale[own, j]).clip(0, q_max) - zero[own, j]).max() <= 0.51
                np.testing.assert_allclose(scale[own, j], step, rtol=2e-3)


@pytest.mark.parametrize("blocks, rows, columns", [(1, 6, 150), (3, 2, 31), (5, 1, 7)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:7", "group:20", "group:100", "group:1000"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_is_optimal(scheme: str, granularity: str, blocks: int, rows: int, columns: int) -> None:
    """Groups that do not divide the columns, above a block of 64, above all columns; grouped layers; all widths."""
    matrix, gram = weight(blocks * rows, columns), correlated(blocks, columns)
    specs = [spec_of(bits, scheme=scheme, granularity=granularity) for bits in WIDTHS]
    for spec, result in zip(specs, gptq(matrix, specs, gram), strict=True):
        assert_each_step_is_optimal(matrix, spec, gram, result)
        if granularity == "tensor":
            assert equal(result[1:], nearest(matrix, [spec])[0][1:]) and result[1].shape == (1, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_to_the_textbook(scheme: str) -> None:
    """Optimal Brain Quantization in the order of the columns, with the explicit inverse and its downdate."""
    matrix, gram = weight(5, 12), correlated(1, 12)
    spec = spec_of(3, scheme=scheme, clip="mse", granularity="group:5", scale_dtype="float32")
    codes, scales, zeros = gptq(matrix, [spec], gram)[0]
    w, inverse = matrix.double().numpy(), np.linalg.inv(damped(gram[0]))
    for j in range(12):
        if j % 5 == 0:
            scale, zero = choose_grid(torch.from_numpy(w[:, None, j : min(j + 5, 12)]).float().contiguous(), spec)
            torch.testing.assert_close(scales[:, j // 5], scale[:, 0], rtol=1e-4, atol=0)
            assert torch.equal(zeros[:, j // 5], zero[:, 0])
            scale, zero = scale.double().numpy()[:, 0], zero.double().numpy()[:, 0]
        code = np.clip(np.round(w[:, j] / scale + zero), spec.codes[0], spec.codes[-1])
        assert (codes[:, j].numpy() == code).all()
        e = (w[:, j] - (code - zero) * scale) / inverse[j, j]
        w = w - np.outer(e, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:7", "group:100"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_that_do_not_go_together_give_rounding_to_nearest(scheme: str, granularity: str) -> None:
    matrix = weight(6, 131)
    gram = torch.diag_embed(torch.rand(2, 131, generator=torch.Generator().manual_seed(2)))
    gram[0, 5, 5] = 0  # an input that is always zero
    for clip in ("none", "mse", "percentile:98"):
        specs = [spec_of(bits, scheme=scheme, granularity=granularity, clip=clip) for bits in WIDTHS]
        for result, plain in zip(gptq(matrix, specs, gram), nearest(matrix, specs), strict=True):
            assert equal(result, plain)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_outputs_error_is_below_that_of_rounding_to_nearest(scheme: str, granularity: str) -> None:
    for blocks, rows, columns in ((1, 16, 80), (8, 40, 9)):
        matrix, gram = weight(blocks * rows, columns), correlated(blocks, columns)
        specs = [spec_of(bits, scheme=scheme, granularity=granularity, clip="mse") for bits in (2, 3, 4, 8)]
        for spec in specs:
            rounded = dequantize(quantize(matrix, spec, gram), spec)
            plain = dequantize(quantize(matrix, replace(spec, rounding="nearest")), spec)
            assert output_error(rounded - matrix, gram) < 0.6 * output_error(plain - matrix, gram)


@pytest.mark.parametrize("bits, scheme", [(1, "symmetric"), (1, "asymmetric"), (2, "symmetric"), (2, "asymmetric")])
def test_between_the_best_codes_of_all_and_rounding_to_nearest(bits: int, scheme: str) -> None:
    """Every code of three columns tried, on the levels that both roundings share."""
    matrix, gram = weight(300, 3, seed=3), correlated(1, 3)
    spec = spec_of(bits, scheme=scheme, scale_dtype="float32")
    result, plain = gptq(matrix, [spec], gram)[0], nearest(matrix, [spec])[0]
    assert equal(result[1:], plain[1:])
    q_min, q_max = spec.codes[0], spec.codes[-1]
    usable = (-1, 1) if spec.is_sign else range(q_min, q_max + 1)
    tried = torch.tensor(list(itertools.product(usable, repeat=3)), dtype=torch.float64)  # (P, 3)
    scale, zero = result[1].double(), result[2].double()  # (C, 1)
    H = torch.from_numpy(damped(gram[0]))

    def error(codes: Tensor) -> Tensor:
        """(..., C) of codes (..., C, 3)."""
        d = (codes.double() - zero) * scale - matrix.double()
        return ((d @ H) * d).sum(dim=-1)

    best = error(tried[:, None].expand(-1, 300, -1)).min(dim=0).values
    got, of_nearest = error(result[0]), error(plain[0])
    assert bool((got >= best * (1 - 1e-9)).all())
    assert float(best.sum()) <= float(got.sum()) < float(of_nearest.sum())


@pytest.mark.parametrize("blocks, rows, columns", [(1, 17, 150), (1, 1, 70), (16, 1, 9), (4, 5, 130)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:10"])
def test_a_width_does_not_depend_on_the_others(granularity: str, blocks: int, rows: int, columns: int) -> None:
    matrix, gram = weight(blocks * rows, columns), correlated(blocks, columns)
    specs = [spec_of(bits, granularity=granularity, clip="mse") for bits in WIDTHS]
    together = gptq(matrix, specs, gram)
    for spec, result in zip(specs, together, strict=True):
        assert equal(gptq(matrix, [spec], gram)[0], result)
    assert equal(gptq(matrix, specs[::-3], gram)[1], together[4])
    assert all(equal(one, other) for one, other in zip(gptq(matrix, specs, gram), together, strict=True))


def test_only_the_shape_of_the_gram_matrix_counts_not_its_size() -> None:
    """Twice the data is the same rounding; powers of two, so that float32 is exact."""
    matrix, gram = weight(6, 80), correlated(1, 80)
    for factor in (2.0**-60, 2.0**60):
        assert equal(gptq(matrix, [spec_of(4)], gram * factor)[0], gptq(matrix, [spec_of(4)], gram)[0])


def test_rows_without_inputs_are_rounded_to_nearest() -> None:
    matrix, gram = weight(6, 75), correlated(3, 75)
    gram[1] = 0
    specs = [spec_of(bits, granularity="group:20", clip="mse") for bits in (1, 3, 8)]
    for result, plain, spec in zip(gptq(matrix, specs, gram), nearest(matrix, specs), specs, strict=True):
        assert all(torch.equal(part[2:4], other[2:4]) for part, other in zip(result, plain, strict=True))
        assert not torch.equal(result[0], plain[0])
        assert equal([part[:2] for part in result], gptq(matrix[:2], [spec], gram[:1])[0])


def test_less_data_than_columns_and_a_row_of_zeros() -> None:
    """A Gram matrix of rank 1, and weights that are zero: nothing is NaN, zeros stay zeros."""
    inputs = weight(1, 20, seed=5)
    matrix = weight(4, 20)
    matrix[2] = 0
    for scheme, bits in itertools.product(SCHEMES, (1, 2, 8)):
        spec = spec_of(bits, scheme=scheme, granularity="group:8", scale_dtype="float32")
        quantized = quantize(matrix, spec, (inputs.T @ inputs)[None])
        rounded = dequantize(quantized, spec)
        assert bool(rounded.isfinite().all()) and bool((rounded[2] == 0).all())


def test_nothing_that_was_given_is_changed() -> None:
    matrix, gram = weight(4, 70), correlated(2, 70)
    copies = matrix.clone(), gram.clone()
    for granularity in ("tensor", "channel", "group:30"):
        quantize_widths(matrix, spec_of(granularity=granularity), (1, 3), gram)
    assert equal((matrix, gram), copies)


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((6, 4, 3), 1),  # conv1d
        ((6, 1, 5), 6),  # conv1d_depthwise
        ((6, 2, 3), 3),  # conv1d of three groups
        ((4, 3, 3, 3), 1),  # conv2d
        ((6, 1, 3, 3), 6),  # conv2d_depthwise
        ((9, 1), 1),  # a column
        ((10,), 1),  # a vector is one row
    ],
)
def test_weights_of_all_shapes(shape: tuple[int, ...], blocks: int) -> None:
    x = torch.nn.Parameter(weight(*shape))
    matrix = x.detach().flatten(1) if len(shape) > 1 else x.detach()[None]
    gram = correlated(blocks, matrix.shape[1])
    for scheme, granularity in itertools.product(SCHEMES, ("tensor", "channel", "group:4")):
        spec = spec_of(8, scheme=scheme, granularity=granularity)
        for bits, quantized in zip((1, 4), quantize_widths(x, spec, (1, 4), gram), strict=True):
            own = replace(spec, bits=bits)
            zero = quantized.zero_point
            assert quantized.codes.shape == shape and quantized.codes.dtype == (
                torch.int8 if zero is None else torch.uint8
            )
            zero = torch.zeros_like(quantized.scale) if zero is None else zero.float()
            result = quantized.codes.float().reshape(matrix.shape), quantized.scale, zero
            assert_each_step_is_optimal(matrix, own, gram, result)
            alone = quantize(x, own, gram)
            assert torch.equal(alone.codes, quantized.codes) and torch.equal(alone.scale, quantized.scale)


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-8])
def test_scales_are_what_half_precision_can_hold(size: float) -> None:
    for clip in ("none", "mse"):
        quantized = quantize(weight(4, 70) * size, spec_of(4, granularity="group:6", clip=clip), correlated(1, 70))
        assert torch.equal(quantized.scale.half().float(), quantized.scale)
        assert bool((quantized.scale > 0).all()) and quantized.scale.shape == (4, 12)
    with pytest.raises(MpqError, match="scale_dtype float32"):
        quantize(weight(4, 70) * 1e9, spec_of(4), correlated(1, 70))


def test_statistics_that_cannot_be_used_are_refused() -> None:
    matrix, gram = weight(6, 8), correlated(1, 8)
    with pytest.raises(MpqError, match="rounding gptq: expected statistics"):
        quantize(matrix, spec_of())
    with pytest.raises(MpqError, match="no calibration data reached it"):
        quantize(matrix, spec_of(), torch.zeros(2, 8, 8))
    for bad in (float("nan"), float("inf")):
        broken = gram.clone()
        broken[0, 2, 3] = bad
        with pytest.raises(MpqError, match="not finite"):
            quantize(matrix, spec_of(), broken)
    for other in (correlated(1, 7), correlated(4, 8), gram[0], gram[:, :, :7]):
        with pytest.raises(MpqError, match=r"statistics of shape \(.*do not fit a weight of \(6, 8\).*another layer"):
            quantize(matrix, spec_of(), other)
    for weights in (torch.zeros(3, 0), torch.full((6, 8), torch.nan)):
        with pytest.raises(MpqError, match="expected"):
            quantize(weights, spec_of(), gram)


def test_codes_are_the_levels_of_the_grid() -> None:
    """What no error was fed to, the first column of each row, is rounded as `nearest_codes` rounds it."""
    matrix = weight(200, 5)
    for scheme, bits in itertools.product(SCHEMES, WIDTHS):
        spec = spec_of(bits, scheme=scheme)
        codes, scale, zero = gptq(matrix, [spec], correlated(1, 5))[0]
        assert torch.equal(codes[:, :1], nearest_codes(matrix[:, None], scale, zero, spec)[:, 0, :1])
