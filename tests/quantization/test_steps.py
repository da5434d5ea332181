"""Steps that differ among rows and columns, and rounding in them."""

import itertools

import numpy as np
import torch
from torch import Tensor

from mpq.quantization.gptq import DAMPING, inverse_factor
from mpq.quantization.quantizers import dequantize, quantize, quantize_widths
from mpq.quantization.spec import QuantSpec
from mpq.quantization.steps import OCTAVE, REACH, ROW_REACH, factors, step_factors, waterfilled

SPEC = QuantSpec(3, "entropy", rounding="gptq")


def correlated(columns: int, seed: int = 0, blocks: int = 1) -> Tensor:
    """Returns (B, K, K) Gram matrices of inputs that go together and differ in power."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(blocks, 20 * columns, columns, generator=generator)
    inputs = inputs + inputs.roll(1, dims=2) * 0.8
    inputs = inputs * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return inputs.transpose(1, 2) @ inputs


def test_factors_are_powers_of_two() -> None:
    exponents = torch.arange(-2 * REACH, 2 * REACH + 1)
    expected = np.float32(np.exp2(exponents.numpy().astype(np.longdouble) / OCTAVE))
    assert np.array_equal(factors(exponents).numpy(), expected)


def test_steps_follow_the_power_of_independent_inputs() -> None:
    power = torch.tensor([1.0, 4.0, 16.0, 64.0])
    rows, columns = waterfilled(inverse_factor(torch.diag(power)[None]), 5)
    steps = step_factors((rows, columns))
    damped = power + DAMPING * power.mean()
    expected = damped**-0.5 / (damped**-0.5).log().mean().exp()
    assert rows.tolist() == [0] * 5 and torch.equal(steps, steps[:1].expand(5, 4))
    assert bool(((steps[0] / expected).log2().abs() <= 0.5 / OCTAVE + 1e-6).all())


def test_rows_of_a_depthwise_kernel_follow_their_channels() -> None:
    grams = torch.eye(3).repeat(4, 1, 1) * torch.tensor([1.0, 1e-2, 1e4, 1.0])[:, None, None]
    rows, columns = waterfilled(inverse_factor(grams), 4)
    assert columns.tolist() == [0, 0, 0] and rows.max() <= ROW_REACH and rows.min() >= -ROW_REACH
    assert rows[1] > rows[0] == rows[3] > rows[2]


def test_among_all_steps_near_them_waterfilled_ones_are_the_best() -> None:
    """The error of rounding with feedback is sum (step_j / U_jj)^2 / 12, the bits -sum log2 step_j."""
    factor = inverse_factor(correlated(4))
    diagonal = factor[0].diagonal().double()
    _, best = waterfilled(factor, 1)

    def error(exponents: Tensor) -> float:
        steps = torch.exp2(exponents.double() / OCTAVE)
        steps = steps / steps.log().mean().exp()  # as many bits for all
        return float((steps / diagonal).square().sum())

    shifts = itertools.product((-1, 0, 1), repeat=4)
    assert all(error(best) <= error(best + torch.tensor(shift)) * 1.02 for shift in shifts)
    assert error(best) < 0.8 * error(torch.zeros(4))


def plain_gptq(weight: Tensor, gram: Tensor, steps: Tensor) -> Tensor:
    """Returns the codes of rounding with feedback on the weight itself, one at a time, in float64."""
    matrix, step = weight.double().numpy().copy(), steps.double().numpy()
    damped = gram.double().numpy() + DAMPING * gram.double().numpy().diagonal().mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    codes = np.zeros_like(matrix)
    for j in range(matrix.shape[1]):
        codes[:, j] = np.round(matrix[:, j] / step[:, j])
        error = (matrix[:, j] - codes[:, j] * step[:, j]) / upper[j, j]
        matrix[:, j:] -= np.outer(error, upper[j, j:])
    return torch.from_numpy(codes)


def test_codes_are_those_of_rounding_with_feedback_in_these_steps() -> None:
    weight = torch.randn(30, 70, generator=torch.Generator().manual_seed(4))
    gram = correlated(70)
    stored = quantize(weight, SPEC, gram)
    assert stored.exponents is not None and len(set(stored.exponents[1].tolist())) > 5
    steps = stored.scale * step_factors(stored.exponents)
    expected = plain_gptq(weight, gram[0], steps)
    assert float((stored.codes != expected).float().mean()) < 2e-3  # where float32 falls on the other side
    assert torch.equal(dequantize(stored, SPEC), stored.codes * steps)


def test_the_outputs_error_is_below_that_of_one_step_and_of_rounding_to_nearest() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(5))
    gram = correlated(48, seed=1)

    def output_error(rounded: Tensor) -> float:
        error = (rounded - weight).double()
        return float(torch.einsum("cj,jk,ck->", error, gram[0].double(), error))

    nearest = QuantSpec(3, "entropy")
    one_step = QuantSpec(3, "symmetric", "tensor", "none", rounding="gptq")
    found = [output_error(dequantize(quantize(weight, spec, gram), spec)) for spec in (SPEC, one_step, nearest)]
    assert found[0] < 0.5 * found[2] and found[0] < found[1]


def test_results_do_not_depend_on_the_other_rates() -> None:
    weight, gram = torch.randn(12, 20, generator=torch.Generator().manual_seed(6)), correlated(20)
    together = quantize_widths(weight, SPEC, [1.4, 2.5, 5], gram)
    for rate, one in zip((1.4, 2.5, 5), together, strict=True):
        (alone,) = quantize_widths(weight, SPEC, [rate], gram)
        assert torch.equal(alone.codes, one.codes) and torch.equal(alone.scale, one.scale)


def test_depthwise_kernels_have_a_matrix_for_each_channel() -> None:
    weight = torch.randn(6, 1, 9, generator=torch.Generator().manual_seed(7))
    grams = correlated(9, blocks=6) * torch.logspace(-3, 3, 6)[:, None, None]
    stored = quantize(weight, SPEC, grams)
    assert stored.codes.shape == weight.shape and stored.exponents is not None
    assert len(set(stored.exponents[0].tolist())) > 2
    assert float((dequantize(stored, SPEC) - weight).abs().mean()) < 0.5
