"""Straight-through quantizers: forward and gradient against torch's operators."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpq.finetuning.straight_through import StraightThrough
from mpq.quantization.grids import matrix_shape
from mpq.quantization.quantizers import quantize
from mpq.quantization.spec import QuantSpec

CHANNELS = QuantSpec(3, "asymmetric", "channel", "none", scale_dtype="float32")


def started(weight: Tensor, spec: QuantSpec, scales: str) -> tuple[StraightThrough, Tensor]:
    """Returns a quantizer whose unit is its scale at the start, and the latent that is the weight itself."""
    start = quantize(weight, spec)
    quantizer = StraightThrough(spec, start.scale, start, scales)
    latent = weight.reshape(matrix_shape(tuple(weight.shape), spec)) / start.scale  # one group a row
    return quantizer, latent.requires_grad_()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_forward_and_gradient_are_those_of_torch(scheme: str, bits: int, clip: str) -> None:
    weight, spec = drawn(6, 40), replace(CHANNELS, scheme=scheme, bits=bits, clip=clip)
    quantizer, latent = started(weight, spec, "frozen")
    seen = quantizer(latent)
    pulled = drawn(6, 40, seed=1)
    (seen * pulled).sum().backward()
    theirs = weight.clone().requires_grad_()
    least, most = (0, 2**bits - 1) if scheme == "asymmetric" else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    scale, zero = quantizer.scale[:, 0], quantizer.zero_point[:, 0].to(torch.int32)
    expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, least, most)
    (expected * pulled).sum().backward()
    assert torch.equal(seen, expected)
    assert torch.allclose(latent.grad / scale[:, None], theirs.grad, rtol=1e-6)
    outside = int((theirs.grad == 0).sum())
    assert outside > 0 if clip == "mse" and bits < 8 else outside <= 40  # the case is there


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_gradient_of_a_learned_scale_is_that_of_torchs_learnable_fake_quantize(scheme: str) -> None:
    weight, spec = drawn(6, 40), replace(CHANNELS, scheme=scheme, clip="mse")
    quantizer, latent = started(weight, spec, "learned")
    pulled = drawn(6, 40, seed=1)
    (quantizer(latent) * pulled).sum().backward()
    least, most = (0, 7) if scheme == "asymmetric" else (-3, 3)
    scale = quantizer.scale[:, 0].clone().requires_grad_()
    zero = quantizer.zero_point[:, 0].clone()
    theirs = weight.clone().requires_grad_()
    seen = torch._fake_quantize_learnable_per_channel_affine(theirs, scale, zero, 0, least, most, 1.0)
    (seen * pulled).sum().backward()
    expected = scale.grad * scale.detach()  # ours is learned as a logarithm
    assert torch.allclose(quantizer.log_scale.grad[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_scale_of_signs_is_the_slope_of_the_output() -> None:
    spec = QuantSpec(1, "symmetric", "channel", scale_dtype="float32")
    quantizer, latent = started(drawn(3, 20), spec, "learned")
    pulled, step = drawn(3, 20, seed=1), 1e-2
    (quantizer(latent) * pulled).sum().backward()
    found = []
    for sign in (-1, 1):
        with torch.no_grad():
            quantizer.log_scale.fill_(sign * step)
            found.append((quantizer(latent) * pulled).sum(dim=1))
    assert torch.allclose(quantizer.log_scale.grad[:, 0], (found[1] - found[0]) / (2 * step), rtol=1e-3, atol=1e-3)


def test_signs_pass_the_gradient_up_to_twice_their_scale() -> None:
    weight = torch.tensor([[0.5, -1.0, 1.5, -3.0, 0.1, 5.9]])  # mean of the absolute values: 2
    quantizer, latent = started(weight, QuantSpec(1, "symmetric", "channel"), "frozen")
    quantizer(latent).sum().backward()
    assert (latent.grad[0] > 0).tolist() == [True, True, True, True, True, False]
