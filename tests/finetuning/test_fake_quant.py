"""The quantized weights of a training: what is stored is what is seen, at one bit-width or several."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpq.artifact.weights import WeightFormat, quantize_weight
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.finetuning.straight_through import MARGIN
from mpq.quantization.quantizers import dequantize, fake_quantize, quantize
from mpq.quantization.spec import QuantSpec


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    bits=st.integers(1, 8),
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    granularity=st.sampled_from(["tensor", "channel", "group:4", "group:7", "group:64"]),
    scales=st.sampled_from(["learned", "recomputed", "frozen"]),
    shape=st.sampled_from([(5,), (3, 9), (4, 2, 5), (2, 1, 3, 3), (1, 1)]),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=150)
def test_what_is_stored_is_what_was_seen(bits, scheme, granularity, scales, shape, dtype, seed) -> None:
    spec = QuantSpec(bits, scheme, granularity, scale_dtype=dtype)
    weights = QuantizedWeights({"w": drawn(*shape, seed=seed)}, [{"w": bits}], WeightFormat(spec), {}, scales)
    before = weights()["w"].detach()
    assert torch.equal(
        before, fake_quantize(drawn(*shape, seed=seed), spec)
    )  # the start is what `mpq pack` would store
    with torch.no_grad():  # as a training might move it
        for parameter in weights.parameters():
            parameter.add_(0.4 * drawn(*parameter.shape, seed=seed + 1))
    seen, stored = weights()["w"].detach(), weights.quantized()["w"]
    assert seen.shape == shape
    assert torch.equal(dequantize(stored, spec), seen)
    assert torch.equal(stored.scale, stored.scale.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_start_keeps_the_codes_of_gptq(bits: int) -> None:
    weight, inputs = drawn(8, 30), drawn(200, 30, seed=1) @ drawn(30, 30, seed=2)
    weight_format = WeightFormat(QuantSpec(8, granularity="group:16", rounding="gptq"))
    grams = {"w": (inputs.t() @ inputs)[None]}
    weights = QuantizedWeights({"w": weight}, [{"w": bits}], weight_format, grams, "learned")
    (expected,) = quantize_weight("w", weight, weight_format, [bits], grams)
    found = weights.quantized()["w"]
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    nearest = quantize(weight, replace(weight_format.spec, bits=bits, rounding="nearest"))
    assert not torch.equal(found.codes, nearest.codes)  # the case is there
    levels = found.codes.float() - found.zero_point.float().repeat_interleave(16, dim=1)[:, :30]
    away = (weights.latents[0].detach() - levels).abs()
    assert float(away.max()) <= 0.5 - MARGIN + 1e-5


def test_recomputed_scales_follow_the_weights_and_their_clip_is_searched_on_request() -> None:
    weight, spec = drawn(4, 64), QuantSpec(3, granularity="group:16")
    weights = QuantizedWeights({"w": weight}, [{"w": 3}], WeightFormat(spec), {}, "recomputed")
    with torch.no_grad():
        weights.latents[0].mul_(2)
        weights.latents[0][:, 5] = 30
    moved = weights.floats()["w"]
    ranged = weights()["w"]
    assert not torch.equal(ranged, fake_quantize(moved, spec))  # the old clip ratios of the new range
    assert float(ranged.detach().max()) > 2 * float(drawn(4, 64).max())
    weights.search()
    assert torch.equal(weights()["w"], fake_quantize(moved, spec))


def test_latents_are_counted_in_steps_of_the_grid() -> None:
    weights = QuantizedWeights({"w": drawn(4, 64)}, [{"w": 3}], WeightFormat(QuantSpec(3)), {}, "frozen")
    before = weights.quantized()["w"].codes.int()
    with torch.no_grad():
        weights.latents[0].add_(1.0)
    after = weights.quantized()["w"].codes.int()
    assert torch.equal(after, (before + 1).clamp(max=7))


def test_layers_left_unquantized_are_seen_as_they_are_stored() -> None:
    weight = drawn(4, 5)
    weights = QuantizedWeights(
        {"a": weight, "b": weight}, [{"a": 16, "b": 32}], WeightFormat(QuantSpec(4)), {}, "learned"
    )
    seen = weights()
    assert torch.equal(seen["a"], weight.half().float()) and torch.equal(seen["b"], weight)
    seen["a"].sum().backward()
    assert torch.equal(weights.latents[0].grad, torch.ones(4, 5))
    assert weights.quantized() == {}


def test_allocations_share_latents_and_the_grids_of_equal_widths() -> None:
    weights = QuantizedWeights(
        {"a": drawn(4, 32), "b": drawn(4, 32, seed=1)},
        [{"a": 4, "b": 3}, {"a": 4, "b": 2}],
        WeightFormat(QuantSpec(4)),
        {},
        "learned",
    )
    assert len(weights.latents) == 2 and len(weights.quantizers) == 3
    large, small = weights(0), weights(1)
    assert torch.equal(large["a"], small["a"]) and not torch.equal(large["b"], small["b"])
    assert torch.equal(small["b"], fake_quantize(weights.floats()["b"], QuantSpec(2)))


@pytest.mark.parametrize("order", [(16, 3), (3, 16), (32, 3)])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "mulaw"])
def test_a_layer_that_only_one_allocation_quantizes(scheme: str, order: tuple[int, int]) -> None:
    """The other one sees the weight itself, though the latent is counted in units, and starts at the weight."""
    weight, pulled = drawn(4, 6, 5), drawn(4, 6, 5, seed=1)  # 30 columns: groups of 8, and one of 6
    spec = QuantSpec(8, scheme, "channel" if scheme == "mulaw" else "group:8", rounding="nearest")
    rounding = replace(spec, rounding="nearest" if scheme == "mulaw" else "gptq")
    grams = {"w": torch.eye(30)[None]}
    weights = QuantizedWeights({"w": weight}, [{"w": bits} for bits in order], WeightFormat(rounding), grams, "learned")
    index = order.index(3)
    seen = weights(1 - index)["w"]
    expected = weight.half().float() if 16 in order else weight
    assert torch.equal(seen, expected) and torch.equal(weights.rounded(1 - index)["w"], expected)
    (seen * pulled).sum().backward()
    moved = weights.latents[0].detach() + weights.latents[0].grad
    (quantizer,) = weights.quantizers.values()
    with torch.no_grad():  # one step along the gradient, in units: unit^2 of the weight's
        along = quantizer.as_weight(moved) - quantizer.as_weight(weights.latents[0])
    units = quantizer.as_weight(torch.ones_like(weights.latents[0]))
    assert torch.allclose(along, pulled * units**2, rtol=1e-4, atol=1e-6)
    assert weights(index)["w"].shape == weight.shape and torch.equal(weights.floats()["w"], weight)


@pytest.mark.parametrize("scales", ["learned", "recomputed", "frozen"])
def test_a_saved_state_brings_back_the_same_weights(scales: str) -> None:
    def made() -> QuantizedWeights:
        return QuantizedWeights({"w": drawn(4, 32)}, [{"w": 3}], WeightFormat(QuantSpec(3)), {}, scales)

    first = made()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.3 * drawn(*parameter.shape))
    first.search()
    second = made()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second()["w"], first()["w"])


def test_parameter_groups_share_the_rate() -> None:
    weights = QuantizedWeights(
        {"a": drawn(4, 32), "b": drawn(4, 32)}, [{"a": 4, "b": 16}], WeightFormat(QuantSpec(4)), {}, "learned"
    )
    groups = weights.parameter_groups(0.5, 0.01)
    assert [group["share"] for group in groups] == [1.0, 0.5, 0.01]
    assert [[one.shape for one in group["params"]] for group in groups] == [[(4, 32)], [(4, 1)], [(4, 32)]]


def test_training_makes_up_for_the_rounding() -> None:
    weight, inputs = drawn(4, 32), drawn(400, 8, seed=3) @ drawn(8, 32, seed=4)  # inputs that have much in common
    weights = QuantizedWeights({"w": weight}, [{"w": 2}], WeightFormat(QuantSpec(2)), {}, "learned")
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.01)
    errors = []
    for _ in range(200):
        error = (inputs @ (weights()["w"] - weight).t()).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("clip", ["none", "mse", "percentile:99"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:16"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_general_quantizer_rounds_as_packing_does(clip: str, granularity: str, bits: int) -> None:
    spec = QuantSpec(bits, "mulaw", granularity, clip)
    weight = drawn(6, 40) ** 3  # far from uniform, so that mu and the clip matter
    weights = QuantizedWeights({"w": weight}, [{"w": bits}], WeightFormat(spec), {}, "learned")
    weights.anneal(500.0, is_hard=True)
    weights.search()
    assert torch.equal(weights()["w"].detach(), fake_quantize(weight, spec))
    assert torch.equal(weights.rounded()["w"], fake_quantize(weight, spec))
    before = weights.rounded()["w"]
    weights.anneal(20.0, is_hard=False)
    weights.search()
    assert torch.equal(weights.rounded()["w"], before) == (bits == 1)  # another mu for a soft assignment


def test_the_general_quantizers_clip_survives_a_saved_state() -> None:
    def made() -> QuantizedWeights:
        spec = QuantSpec(3, "mulaw", "group:16")
        return QuantizedWeights({"w": drawn(6, 40) ** 3}, [{"w": 3}], WeightFormat(spec), {}, "learned")

    first, second = made(), made()
    first.anneal(500.0, is_hard=True)
    first.search()
    assert not torch.equal(first.rounded()["w"], second.rounded()["w"])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.rounded()["w"], second.rounded()["w"])
    assert float(first.quantizers["0:3"].kernel.clip_ratio.min()) < 1
