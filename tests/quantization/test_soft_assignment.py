"""The soft assignment against its definition in float64, and weights that end on their centroids."""

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.quantization import soft_assignment as module
from mpq.quantization.grids import scale_shape
from mpq.quantization.mu_law import MUS, mu_law_centroids
from mpq.quantization.quantizers import dequantize, quantize
from mpq.quantization.soft_assignment import GeneralQuantizer, SoftToHard, annealed_alpha, soft_assign
from mpq.quantization.spec import QuantSpec

ALPHAS = (0.0, 1.0, 10.0, 100.0, 500.0, 3e3, 1e5)
GRANULARITIES = ("tensor", "channel", "group:4", "group:1000")


def dense(weights: Tensor, centroids: Tensor, alpha: float) -> Tensor:
    """Zhen et al. 2022, Eq. 2-3 as printed, with the nearest centroid's distance subtracted; float64."""
    z = centroids.double() / 128
    distances = (weights.double()[..., None] - z).abs()
    return torch.softmax(alpha * (distances.amin(dim=-1, keepdim=True).detach() - distances), dim=-1) @ z


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def points(centroids: Tensor) -> Tensor:
    """Weights inside and outside, and around where two centroids meet; none on a centroid, where there is a kink."""
    z = centroids.double().unique() / 128
    middles = (z[1:] + z[:-1]) / 2
    near = [middles + shift for shift in (0, 1e-6, -3e-5, 1e-3)]
    found = torch.cat([0.5 * random(300).double(), torch.linspace(-1.3, 1.3, 301).double(), *near]).float()
    return found[found * 128 != (found * 128).round()]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_to_the_definition(bits: int, alpha: float) -> None:
    for mu in (0.0, 15.0, 255.0):  # at 255 some centroids are equal
        centroids = mu_law_centroids(bits, mu)
        weights = points(centroids).requires_grad_()
        gradient = random(len(weights), seed=1)
        soft_assign(weights, centroids, alpha).backward(gradient)
        exact = weights.detach().double().requires_grad_()
        expected = dense(exact, centroids, alpha)
        expected.backward(gradient.double())
        assert float((soft_assign(weights, centroids, alpha) - expected).detach().abs().max()) < 1e-6
        assert float((weights.grad - exact.grad).abs().max()) < 1e-6 * max(alpha, 1)


@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=12).map(sorted),
    st.floats(0, 1e5),
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20),
)
def test_equal_to_the_definition_for_any_centroids(centroids: list[int], alpha: float, weights: list[float]) -> None:
    z, w = torch.tensor(centroids, dtype=torch.int8), torch.tensor(weights)
    assert float((soft_assign(w, z, alpha) - dense(w, z, alpha)).abs().max()) < 1e-6


def test_float64_passes_gradcheck() -> None:
    for alpha in (1.0, 10.0, 100.0):
        weights = points(mu_law_centroids(3, 15))[::7].double().requires_grad_()
        assert torch.autograd.gradcheck(lambda w, a=alpha: soft_assign(w, mu_law_centroids(3, 15), a), weights)
        values = soft_assign(weights, mu_law_centroids(3, 15), alpha)
        torch.testing.assert_close(values, dense(weights, mu_law_centroids(3, 15), alpha), rtol=0, atol=1e-14)


def test_values_by_hand() -> None:
    """Centroids -1/2, 0 and 0 (twice), 1/2, and alpha 2 ln 2: each 1/2 of distance halves the share."""
    z = torch.tensor([-64, 0, 0, 64], dtype=torch.int8)
    weights = torch.tensor([0.0, 0.5, 7.0, 0.25])
    # shares at 0: 1/2 1 1 1/2; at 1/2 and beyond: 1/4 1/2 1/2 1; at 1/4: 2^-1.5 and 2^-0.5 three times
    expected = torch.tensor([0.0, 0.375 / 2.25, 0.375 / 2.25, 0.5 * (2**-0.5 - 2**-1.5) / (3 * 2**-0.5 + 2**-1.5)])
    torch.testing.assert_close(soft_assign(weights, z, 1.3862943611198906), expected)


def test_a_large_alpha_rounds() -> None:
    spec = QuantSpec(3, "mulaw", "tensor", "none", scale_dtype="float32")
    weights = torch.cat([0.4 * random(1000), torch.tensor([1.0, -1.0])])
    for mu in MUS:
        z = mu_law_centroids(3, mu)
        middles = (z[1:].float() + z[:-1].float()) / 256
        apart = (weights[:, None] - middles).abs().amin(dim=1) > 1e-4
        weights_in = weights.clamp(-1, 1)
        rounded = dequantize(quantize(weights_in, spec, centroids=z), spec)
        assert torch.equal(soft_assign(weights_in, z, 1e6)[apart], rounded[apart])


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
@pytest.mark.parametrize("shape", [(1, 30), (5, 6), (30,), (2, 3, 5)])
def test_pieces_do_not_matter(shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradient = random(*shape, seed=2), random(*shape, seed=3)
    for granularity in ("tensor", "channel"):
        results = []
        for size in (2**16, at_once):
            monkeypatch.setattr(module, "_AT_ONCE", size)
            leaf = weights.clone().requires_grad_()
            value = SoftToHard(QuantSpec(3, "mulaw", granularity, "none"))(leaf)
            value.backward(gradient)
            results.append((value, leaf.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_what_is_not_finite_stays_so() -> None:
    z = mu_law_centroids(4, 15)
    for alpha in (1.0, 1e6):
        values = soft_assign(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5]), z, alpha)
        ends = dense(torch.tensor([9.0, -9.0]), z, alpha).float()
        assert values[0].isnan() and values[3].isfinite()
        torch.testing.assert_close(values[1:3], ends)


def test_bad_arguments() -> None:
    z = mu_law_centroids(2, 0)
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(MpqError, match="alpha: expected"):
            soft_assign(torch.zeros(3), z, alpha)
    with pytest.raises(MpqError, match="centroids: expected"):
        soft_assign(torch.zeros(3), z.flip(0), 1.0)
    with pytest.raises(MpqError, match="scheme: expected mulaw"):
        SoftToHard(QuantSpec(2))


def test_alpha_rises_linearly() -> None:
    assert annealed_alpha(0, 100, 300, 10, 500) == annealed_alpha(100, 100, 300, 10, 500) == 10
    assert annealed_alpha(150, 100, 300, 10, 500) == 10 + 50 * 490 / 200
    assert annealed_alpha(300, 100, 300, 10, 500) == annealed_alpha(10**6, 100, 300, 10, 500) == 500
    assert [annealed_alpha(step, 5, 5, 1, 2) for step in (4, 5)] == [1, 2]


# One kernel


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 3, 3), (5,)])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_kernel_is_scaled_softened_and_scaled_back(bits: int, shape: tuple[int, ...], granularity: str) -> None:
    """Against a loop over the weights, with the scales that are stored."""
    spec = QuantSpec(bits, "mulaw", granularity, "none")
    kernel = SoftToHard(spec, alpha=20.0, mu=7.0)
    weight = (0.3 * random(*shape, seed=4)).requires_grad_()
    value = kernel(weight)
    value.sum().backward()
    scale = kernel.quantized(weight).scale
    rows = 1 if granularity == "tensor" or len(shape) == 1 else shape[0]
    assert tuple(scale.shape) == scale_shape(shape, spec) and value.dtype == torch.float32
    latents, values, slopes = (one.reshape(rows, -1) for one in (weight.detach(), value.detach(), weight.grad))
    for row, column in itertools.product(range(rows), range(latents.shape[1])):
        one = scale[row, column // spec.group_size if spec.group_size else 0].double()
        x = (latents[row, column].double() / one).requires_grad_()
        expected = dense(x, kernel.centroids, 20.0)
        expected.backward()
        assert float(values[row, column] - one * expected.detach()) == pytest.approx(0, abs=1e-6 * float(one))
        if x.detach().abs() != 1:  # the largest weight of a group may lie on the pole, where there is a kink
            assert float(slopes[row, column] - x.grad) == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_hard_is_what_is_stored(granularity: str, clip: str) -> None:
    for bits, shape in ((1, (4, 9)), (2, (3, 2, 5)), (4, (7,)), (8, (3, 10))):
        kernel = SoftToHard(QuantSpec(bits, "mulaw", granularity, clip))
        weight = (0.1 * random(*shape, seed=5)).requires_grad_()
        kernel.choose_mu(weight)
        kernel.is_hard = True
        value = kernel(weight)
        assert torch.equal(value, dequantize(kernel.quantized(weight), kernel.spec))
        gradient = random(*shape, seed=6)
        value.backward(gradient)
        assert torch.equal(weight.grad, gradient)  # straight through


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_soft_becomes_hard(granularity: str) -> None:
    weight = 0.1 * random(6, 9)
    kernel = SoftToHard(QuantSpec(3, "mulaw", granularity, "none"), alpha=500)
    soft, kernel.alpha = kernel(weight), 1e6
    hard = dequantize(kernel.quantized(weight), kernel.spec)
    assert torch.equal(kernel(weight), hard) and not torch.equal(soft, hard)


@pytest.mark.parametrize("is_hard", [False, True])
def test_mu_is_the_best_of_all(is_hard: bool) -> None:
    chosen = set()
    for weight in (random(5, 40) ** 3, random(5, 40), torch.linspace(-1, 1, 200).reshape(5, 40)):
        for alpha in (10.0, 200.0):
            kernel = SoftToHard(QuantSpec(4, "mulaw", "channel", "none"), alpha)
            kernel.is_hard = is_hard
            scale = weight.abs().amax(dim=1, keepdim=True).half().double()
            errors = []
            for mu in MUS:
                value = dense(weight.double() / scale, mu_law_centroids(4, mu), 1e7 if is_hard else alpha) * scale
                errors.append(float((value - weight).square().sum()))
            mu = kernel.choose_mu(weight)
            assert errors[MUS.index(mu)] == pytest.approx(min(errors), rel=1e-4)
            assert kernel.mu == mu and torch.equal(kernel.centroids, mu_law_centroids(4, mu))
            chosen.add(mu)
    assert len(chosen) > 1


def test_the_state_survives() -> None:
    kernel = SoftToHard(QuantSpec(4, "mulaw", "channel", "none"))
    kernel.choose_mu(random(3, 50) ** 3)
    kernel.alpha, kernel.is_hard = 123.5, True
    buffer = io.BytesIO()
    torch.save(kernel.state_dict(), buffer)
    buffer.seek(0)
    other = SoftToHard(kernel.spec)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert (other.alpha, other.is_hard, other.mu) == (123.5, True, kernel.mu) and kernel.mu > 0
    assert torch.equal(other.centroids, kernel.centroids)


def test_degenerate_kernels() -> None:
    spec = QuantSpec(3, "mulaw", "group:4", "none")
    weight = torch.zeros(2, 9).requires_grad_()
    kernel = SoftToHard(spec)
    assert kernel.choose_mu(weight) == 0
    value = kernel(weight)
    value.sum().backward()
    assert bool((value == 0).all()) and bool((weight.grad > 0).all())  # zeros can leave
    kernel.is_hard = True
    assert bool((kernel(weight) == 0).all())
    with pytest.raises(MpqError):
        kernel(torch.full((2, 9), torch.nan))
    kernel.is_hard = False
    with pytest.raises(MpqError):
        kernel(torch.full((2, 9), torch.nan))


def test_half_precision_weights() -> None:
    weight = random(4, 30)
    kernel = SoftToHard(QuantSpec(4, "mulaw", "channel", "none"))
    for kernel.is_hard in (False, True):
        value = kernel(weight.half().requires_grad_())
        assert value.dtype == torch.float16 and value.requires_grad
        assert torch.equal(value, kernel(weight.half().float()).half())


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    weight, gradient = random(40, 70) ** 3, random(40, 70, seed=1)
    for bits, is_hard in itertools.product((1, 3, 8), (False, True)):
        results = []
        for device in ("cpu", "cuda"):
            kernel = SoftToHard(QuantSpec(bits, "mulaw", "group:32", "none"), alpha=30.0).to(device)
            leaf = weight.to(device, copy=True).requires_grad_()
            mu = kernel.choose_mu(leaf)
            kernel.is_hard = is_hard
            value = kernel(leaf)
            value.backward(gradient.to(device))
            results.append((mu, value.detach().cpu(), leaf.grad.cpu()))
        (mu, value, slope), (other_mu, other_value, other_slope) = results
        assert mu == other_mu
        torch.testing.assert_close(value, other_value, rtol=0, atol=1e-6)
        torch.testing.assert_close(slope, other_slope, rtol=0, atol=1e-4)


# A training


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))


BITS = {"0.weight": 2, "2.weight": 3}


def test_a_small_net_learns_while_its_weights_move_to_their_centroids() -> None:
    model = net()
    x = random(256, 4, seed=1)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    latents = dict(model.named_parameters())
    general_quantizer = GeneralQuantizer(model, BITS, start_step=50, end_step=350, mu_every=50)
    general_quantizer.on_train_begin()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses, alphas = [], []
    for step in range(400):
        general_quantizer.on_step_begin(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        alphas.append(general_quantizer.kernels["0.weight"].alpha)
    soft = model[0].weight.detach().clone()
    general_quantizer.on_train_end()

    assert alphas[:51] == [10.0] * 51 and alphas[350:] == [500.0] * 50
    assert alphas[200] == 10 + 150 * 490 / 300
    rounded_at_once = net()  # trained without, then rounded in the same way
    optimizer = torch.optim.Adam(rounded_at_once.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (rounded_at_once(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        for name, bits in BITS.items():
            weight = rounded_at_once.get_parameter(name)
            spec = QuantSpec(bits, "mulaw", "channel", "none")
            weight.copy_(dequantize(quantize(weight, spec), spec))
        ours, theirs = ((one(x) - y).square().mean().item() for one in (model, rounded_at_once))
    assert ours < 0.5 * losses[0] and ours < 0.7 * theirs

    assert dict(model.named_parameters()).keys() == latents.keys() == net().state_dict().keys()
    assert all(parameter is latents[name] for name, parameter in model.named_parameters())
    assert float((soft - model[0].weight).detach().abs().mean()) < 0.02  # most were there already
    for name, quantized in general_quantizer.quantized().items():
        weight = model.get_parameter(name).detach()
        spec = QuantSpec(BITS[name], "mulaw", "channel", "none")
        assert torch.equal(dequantize(quantized, spec), weight)
        levels = quantized.centroids.float() / 128 * quantized.scale  # (C, m)
        assert bool((weight[:, :, None] == levels[:, None]).any(dim=-1).all())


def test_before_the_end_the_latent_weights_are_kept() -> None:
    model, plain = net(), net()
    general_quantizer = GeneralQuantizer(model, BITS, "tensor", start_step=0, end_step=10)
    before = general_quantizer.quantized()
    general_quantizer.on_train_begin()
    assert torch.equal(model[0].parametrizations.weight.original, plain[0].weight)
    assert not torch.equal(model[0].weight, plain[0].weight) and torch.equal(model[0].bias, plain[0].bias)
    assert before.keys() == general_quantizer.quantized().keys() == BITS.keys()
    again = GeneralQuantizer(net(1), BITS, "tensor", start_step=0, end_step=10)
    again.on_train_begin()
    general_quantizer.on_step_begin(5)
    again.model.load_state_dict(model.state_dict())
    assert torch.equal(again.model(torch.ones(1, 4)), model(torch.ones(1, 4)))
    assert again.kernels["2.weight"].alpha == 255


def test_the_end_is_hard_however_small_alpha_was() -> None:
    model = net()
    general_quantizer = GeneralQuantizer(model, BITS, "group:3", start_step=5, end_step=10)
    general_quantizer.on_train_begin()
    general_quantizer.on_step_begin(0)
    expected = general_quantizer.quantized()
    general_quantizer.on_train_end()
    for name, quantized in general_quantizer.quantized().items():
        assert torch.equal(quantized.codes, expected[name].codes)
        spec = QuantSpec(BITS[name], "mulaw", "group:3", "none")
        assert torch.equal(model.get_parameter(name), dequantize(quantized, spec))


def test_mu_is_chosen_again_up_to_the_end_of_the_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    general_quantizer = GeneralQuantizer(net(), {"0.weight": 3}, start_step=0, end_step=25, mu_every=10)
    general_quantizer.on_train_begin()
    chosen = []
    monkeypatch.setattr(SoftToHard, "choose_mu", lambda self, weight: chosen.append((step, weight.shape)))
    for step in range(60):
        general_quantizer.on_step_begin(step)
    assert chosen == [(10, (32, 4)), (20, (32, 4))]


def test_what_the_callback_refuses() -> None:
    for bits, options, words in (
        ({"1.weight": 4}, {}, "no parameter '1.weight'; known: 0.weight"),
        ({"0.weight": 9}, {}, "bits: expected"),
        (BITS, {"start_step": 9, "end_step": 3}, "start_step, end_step"),
        (BITS, {"mu_every": 0}, "mu_every"),
        (BITS, {"granularity": "row"}, "granularity"),
    ):
        with pytest.raises(MpqError, match=words):
            GeneralQuantizer(net(), bits, **({"start_step": 0, "end_step": 10} | options))
