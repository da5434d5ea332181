"""The quantizer of entropy-coded weights: forward, gradient and estimated bits against plain expressions of torch."""

import math

import pytest
import torch
from torch import Tensor

from mpq.artifact.weights import WeightFormat, quantize_weight
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.finetuning.straight_through import MARGIN
from mpq.finetuning.unclipped import UnclippedThrough, unclipped_latent
from mpq.quantization.quantizers import Quantized, dequantize, quantize
from mpq.quantization.spec import QuantSpec
from mpq.quantization.steps import step_factors

SPEC = QuantSpec(2.2, "entropy", rounding="gptq")
SHAPES = [(6, 10), (4, 3, 5), (4, 1, 3, 3), (7,), (1, 1)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(shape: tuple[int, ...], blocks: int = 1) -> Tensor:
    """Returns (B, K, K) statistics of inputs of very different sizes."""
    columns = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    inputs = (
        drawn(blocks, 50, columns, seed=1)
        * torch.logspace(-1, 1, columns)
        * torch.logspace(0, 1, blocks)[:, None, None]
    )
    return inputs.mT @ inputs


def started(shape: tuple[int, ...], scales: str, blocks: int = 1) -> tuple[UnclippedThrough, Tensor, Quantized]:
    """Returns a quantizer, the latent that it starts with and gptq's result."""
    weight = drawn(*shape)
    start = quantize(weight, SPEC, gram_of(shape, blocks))
    latent = unclipped_latent(weight, start, start.scale, keep_codes=True)
    return UnclippedThrough(SPEC, start.scale, start, scales), latent.requires_grad_(), start


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("stretch", [1.0, 2 ** (3 / 64)])
@pytest.mark.parametrize("scales", ["learned", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_what_was_seen(shape: tuple[int, ...], scales: str, stretch: float, blocks: int) -> None:
    if blocks > 1 and (shape[0] % blocks or len(shape) == 1):
        return
    quantizer, latent, start = started(shape, scales, blocks)
    assert torch.equal(quantizer(latent).reshape(shape), dequantize(start, SPEC))  # the start is what gptq gives
    with torch.no_grad():
        latent.add_(0.7 * drawn(*latent.shape, seed=2))
        quantizer.stretch.fill_(stretch)
        if quantizer.log_scale is not None:
            quantizer.log_scale.fill_(0.013)
    stored = quantizer.quantized(latent)
    assert stored.codes.dtype == torch.int32 and stored.codes.shape == shape
    assert torch.equal(stored.scale, stored.scale.half().float())
    assert torch.equal(dequantize(stored, SPEC), quantizer(latent).detach().reshape(shape))
    grown = float(stored.scale / start.scale)
    assert grown == pytest.approx(stretch * math.exp(0.013 if scales == "learned" else 0.0), rel=1e-3)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 5), (2, 1)])
def test_gradients_are_those_of_autograd_with_the_rounding_detached(shape: tuple[int, ...], blocks: int) -> None:
    """Of all weights, however far from zero: nothing is clipped."""
    quantizer, latent, start = started(shape, "learned", blocks)
    with torch.no_grad():
        latent.mul_(5).add_(0.7 * drawn(*latent.shape, seed=2))
        quantizer.stretch.fill_(1.25)
    pulled = drawn(*latent.shape, seed=3)
    seen = quantizer(latent)
    (seen * pulled).sum().backward()
    theirs, log_scale = latent.detach().clone().requires_grad_(), torch.zeros(1, 1, requires_grad=True)
    scale = quantizer.current_scale() * log_scale.exp()
    ratio = theirs * start.scale / scale
    expected = (ratio + (ratio.round() - ratio).detach()) * scale * step_factors(start.exponents)
    (expected * pulled).sum().backward()
    assert torch.allclose(seen, expected, rtol=1e-6)
    assert torch.allclose(latent.grad, theirs.grad, rtol=1e-5) and bool((latent.grad != 0).all())
    assert torch.allclose(quantizer.log_scale.grad, log_scale.grad, rtol=1e-3, atol=1e-5)


def test_a_frozen_scale_has_the_same_gradient() -> None:
    grads = []
    for scales in ("learned", "frozen"):
        quantizer, latent, _ = started((6, 10), scales)
        quantizer(latent).square().sum().backward()
        grads.append(latent.grad)
    assert torch.equal(*grads) and quantizer.log_scale is None


def test_latents_are_counted_in_steps_and_start_inside_gptqs_intervals() -> None:
    weight, gram = drawn(6, 10), gram_of((6, 10))
    weight_format = WeightFormat(SPEC)
    weights = QuantizedWeights({"w": weight}, [{"w": 2.2}], weight_format, {"w": gram}, "frozen")
    (start,) = quantize_weight("w", weight, weight_format, [2.2], {"w": gram})
    stored = weights.quantized()["w"]
    assert torch.equal(stored.codes, start.codes) and bool(start.exponents[1].any())
    assert float((weights.latents[0] - start.codes).abs().max().detach()) <= 0.5 - MARGIN + 1e-5
    nearest = (weight / (start.scale * step_factors(start.exponents))).round()
    assert not torch.equal(start.codes, nearest.int())  # the case is there
    with torch.no_grad():
        weights.latents[0].add_(1.0)
    assert torch.equal(weights.quantized()["w"].codes, start.codes + 1)


def test_allocations_have_steps_of_one_shape_and_codes_next_to_the_weight() -> None:
    weight, gram = drawn(6, 10), gram_of((6, 10))
    allocations = [{"w": 3.1}, {"w": 16}, {"w": 1.5}, {"w": 3.1}]
    weights = QuantizedWeights({"w": weight}, allocations, WeightFormat(SPEC), {"w": gram}, "learned")
    torch.testing.assert_close(weights.floats()["w"], weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights(1)["w"].detach(), weight.half().float(), rtol=1e-3, atol=0)
    for index, rate in ((0, 3.1), (2, 1.5)):
        (gptq,) = quantize_weight("w", weight, WeightFormat(SPEC), [rate], {"w": gram})
        stored = weights.quantized(index)["w"]
        assert torch.equal(stored.exponents[1], gptq.exponents[1]) and torch.equal(stored.scale, gptq.scale)
        steps = gptq.scale * step_factors(gptq.exponents)
        assert torch.equal(stored.codes, (weight / steps).round().int())
    weights.stretch(0, 1.5)
    assert [weights.stretched(index) for index in range(4)] == [1.5, 1.0, 1.0, 1.0]
    assert not torch.equal(weights(0)["w"], weights(3)["w"])


def test_weights_without_statistics_have_one_step() -> None:
    weight = drawn(6, 10)
    spec = QuantSpec(2.2, "entropy")
    weights = QuantizedWeights({"w": weight}, [{"w": 2.2}], WeightFormat(spec), {}, "learned")
    assert torch.equal(weights()["w"].detach(), dequantize(quantize(weight, spec), spec))
    assert not any(bool(one.any()) for one in weights.quantized()["w"].exponents)


def test_zeros_stay_zeros_and_cost_nothing() -> None:
    spec = QuantSpec(2, "entropy")
    weights = QuantizedWeights({"w": torch.zeros(3, 4)}, [{"w": 2}], WeightFormat(spec), {}, "learned")
    assert not weights()["w"].any()
    bits = weights.coded_bits()
    bits.backward()
    assert float(bits.detach()) < 1e-6 and bool(weights.latents[0].grad.isfinite().all())


def geometric_bits(mean: float) -> float:
    """Returns the entropy of whole numbers, two-sided geometric with a mean magnitude, by adding up (bits)."""
    theta = (math.sqrt(1 + mean**2) - 1) / mean
    chances = [(1 - theta) / (1 + theta) * theta ** abs(number) for number in range(-3000, 3001)]
    assert sum(chances) == pytest.approx(1)
    assert sum(abs(number - 3000) * chance for number, chance in enumerate(chances)) == pytest.approx(mean)
    return -sum(chance * math.log2(chance) for chance in chances if chance)


@pytest.mark.parametrize("number", [0, 1, 2, 40])
def test_estimated_bits_are_the_entropy_of_geometric_codes(number: int) -> None:
    """Of two rows with codes of this magnitude and the next one, and of zeros and ones."""
    quantizer = UnclippedThrough(
        SPEC, torch.ones(1, 1), Quantized(torch.zeros(2, 4, dtype=torch.int32), torch.ones(1, 1), None), "frozen"
    )
    latent = torch.tensor([[number, -number - 1.0, number, -number - 1.0], [0.2, 0, 1.3, 0]])
    expected = 4 * geometric_bits(number + 0.5) + 4 * geometric_bits(0.25)
    assert float(quantizer.coded_bits(latent)) == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_estimated_bits_is_the_slope_in_the_codes() -> None:
    """A code more costs what the difference says; larger steps make all codes smaller."""
    start = Quantized(torch.zeros(1, 200, dtype=torch.int32), torch.ones(1, 1), None)
    quantizer = UnclippedThrough(SPEC, torch.ones(1, 1), start, "learned")
    latent = (3 * drawn(1, 200)).round().requires_grad_()
    place = int(latent.detach()[0].argmax())
    quantizer.coded_bits(latent).backward()
    up, down = (latent.detach().clone() for _ in range(2))
    up[0, place] += 1
    down[0, place] -= 1
    difference = float((quantizer.coded_bits(up) - quantizer.coded_bits(down)).detach()) / 2
    assert float(latent.grad[0, place]) == pytest.approx(difference, rel=1e-3)
    assert bool((latent.grad.sign() == latent.detach().sign()).all())
    # along all magnitudes at once the bits change as along the scale, against it
    assert float(quantizer.log_scale.grad) == pytest.approx(-float((latent.grad * latent.detach()).sum()), rel=1e-5)
