"""Second-order scores against finite differences of the outputs in float64, exact divergences, and simulated data."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity import fisher
from mpq.sensitivity.fisher import fisher_scores, rounding_errors, typical_scores
from mpq.sensitivity.statistics import input_grams

NEAREST = WeightFormat(QuantSpec(8))
WIDTHS = (2, 4)


def utterance(model: AsrModel, frames: int = 45, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Returns features of noise, without a frame of padding."""
    wave = 0.1 * torch.randn(1, 160 * frames, generator=torch.Generator().manual_seed(seed))
    features, lengths = model.features(wave, torch.tensor([160 * frames]))
    return features[:, :frames], lengths


class Outputs64:
    """The model's distributions in float64: what the derivatives are taken of."""

    def __init__(self, features: Tensor, lengths: Tensor) -> None:
        self.model = tiny_model().double()
        self.parameters = dict(self.model.named_parameters())
        self.features = features.double()
        context = self.model.context(lengths, features.shape[1])
        self.context = replace(context, positions=context.positions.double())

    @torch.no_grad()
    def log_probs(self, output: str, name: str | None = None, change: Tensor | float = 0.0) -> Tensor:
        """(T', V) with `change` added to a weight."""
        if name is not None:
            weight = self.parameters[name]
            original = weight.data
            weight.data = original + change.reshape(original.shape)
        x = self.features
        for segment in self.model.segments:
            x = segment.run(x, self.context)
        if output == "ctc":
            x = self.model.head("ctc").logits(x, None)
        if name is not None:
            weight.data = original
        return x[0].log_softmax(dim=-1)

    def slope(self, output: str, name: str, direction: Tensor) -> Tensor:
        """(T', V) derivative of the log-probabilities along a direction: central differences."""
        step = 1e-5 * direction.double() / direction.double().norm()
        difference = self.log_probs(output, name, step) - self.log_probs(output, name, -step)
        return difference / 2e-5 * float(direction.double().norm())

    def exact(self, output: str, name: str, direction: Tensor) -> float:
        """1/2 E[(d . gradient of log p(y))^2] summed over the frames: every label of every frame, by its probability.

        Labels of different frames are independent and their gradients have mean zero, so there are no cross terms.
        """
        probabilities = self.log_probs(output).exp()
        return 0.5 * float((probabilities * self.slope(output, name, direction).square()).sum())


def output_of(name: str, output: str) -> str:
    return "ctc" if name.startswith("decoder.") else output


@pytest.mark.parametrize("output", ["ctc", "encoder"])
def test_a_draw_is_the_squared_slope_by_its_signs(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With signs that the test chooses, against slopes of every label in every frame."""
    model = tiny_model()
    features, lengths = utterance(model)
    errors = rounding_errors(model, NEAREST, WIDTHS, {})
    reference = Outputs64(features, lengths)
    drawn: dict[int, list[Tensor]] = {}

    def choose(low: int, high: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        assert (low, high) == (0, 2)
        own = drawn.setdefault(shape[1], [])
        own.append((torch.arange(shape.numel()).reshape(shape) * 7 // (3 + len(own))) % 2)
        return own[-1]

    monkeypatch.setattr(torch, "randint", choose)
    scores, frames = fisher_scores(model, errors, features, lengths, output=output)
    assert scores.dtype == torch.float64 and scores.shape == (len(errors), len(WIDTHS))
    assert frames == int(model.encoded_lengths(lengths)) == 12
    assert all(len(signs) == fisher.DRAWS for signs in drawn.values())
    assert set(drawn) == ({29} if output == "ctc" else {29, 16})
    for row, (name, directions) in zip(scores, errors.items(), strict=True):
        for score, direction in zip(row.tolist(), directions, strict=True):
            slope = reference.slope(output_of(name, output), name, direction)
            roots = reference.log_probs(output_of(name, output)).exp().sqrt()
            sums = [((2.0 * signs - 1) * roots * slope).sum() for signs in drawn[slope.shape[1]]]
            expected = 0.5 * float(torch.stack(sums).square().mean())
            assert score == pytest.approx(expected, rel=2e-3, abs=1e-4 * float((roots * slope).square().sum()))


@pytest.mark.parametrize("output", ["ctc", "encoder"])
def test_the_mean_over_draws_is_the_fisher_form(output: str) -> None:
    model = tiny_model()
    features, lengths = utterance(model, 30)
    errors = rounding_errors(model, NEAREST, WIDTHS, {})
    reference = Outputs64(features, lengths)
    draws = torch.stack([fisher_scores(model, errors, features, lengths, seed, output)[0] for seed in range(100)])
    exact = [
        [reference.exact(output_of(name, output), name, direction) for direction in directions]
        for name, directions in errors.items()
    ]
    expected = torch.tensor(exact, dtype=torch.float64)
    z = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / 10)
    assert float(z.abs().max()) < 5
    assert 0.5 < float(z.square().mean().sqrt()) < 1.6  # as large as chance makes them
    assert float((draws.mean(dim=0) / expected).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("output", ["ctc", "encoder"])
def test_the_fisher_form_is_the_divergence_of_small_changes(output: str) -> None:
    """So the scores' unit and factor are those of the exact divergence, nats."""
    model = tiny_model()
    reference = Outputs64(*utterance(model))
    errors = rounding_errors(model, NEAREST, (3,), {})
    before = reference.log_probs(output)
    for name, (direction,) in errors.items():
        if output_of(name, output) != output:
            continue
        after = reference.log_probs(output, name, 1e-3 * direction.double())
        kl = float((before.exp() * (before - after)).sum())
        assert kl / 1e-6 == pytest.approx(reference.exact(output, name, direction), rel=0.02)


def test_scores_depend_on_the_seed_and_the_utterance_alone() -> None:
    model = tiny_model()
    data = [utterance(model, 30), utterance(model, 30, seed=5)]
    errors = rounding_errors(model, NEAREST, (1, 3, 8), {})
    first, other = (fisher_scores(model, errors, *pair, seed=1)[0] for pair in data)
    assert torch.equal(fisher_scores(model, errors, *data[0], seed=1)[0], first)
    assert not torch.equal(first, other)
    assert not torch.equal(fisher_scores(model, errors, *data[0], seed=2)[0], first)
    for index in range(3):  # a width does not depend on the others, a layer not on the others
        alone = {name: [widths[index]] for name, widths in errors.items()}
        assert torch.equal(fisher_scores(model, alone, *data[0], seed=1)[0][:, 0], first[:, index])
    name = list(errors)[7]
    assert torch.equal(fisher_scores(model, {name: errors[name]}, *data[0], seed=1)[0][0], first[7])
    zero = {name: [torch.zeros_like(errors[name][0])]}
    assert float(fisher_scores(model, zero, *data[0])[0]) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_signs_of_utterances_are_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    errors = rounding_errors(model, NEAREST, (3,), {})
    draw, drawn = torch.randint, []

    def keep(*arguments: object, generator: torch.Generator) -> Tensor:
        drawn.append(draw(*arguments, generator=generator))
        return drawn[-1]

    monkeypatch.setattr(torch, "randint", keep)
    for frame_seed, seed in ((4, 0), (4, 0), (5, 0), (4, 1)):
        fisher_scores(model, errors, *utterance(model, seed=frame_seed), seed=seed)
    first, again, *others = (drawn[start : start + fisher.DRAWS] for start in range(0, len(drawn), fisher.DRAWS))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(first[0], other[0]) for other in others)
    assert 0.3 < float(first[0].double().mean()) < 0.7


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    name = "encoder.layers.1.feed_forward2.linear2.weight"

    def break_it(gradient: Tensor) -> Tensor:
        return gradient * torch.inf

    errors = rounding_errors(model, NEAREST, WIDTHS, {})
    handle = dict(model.named_parameters())[name].register_hook(break_it)
    with pytest.raises(MpqError, match=rf"^{name}: expected a finite gradient, got NaN or infinity"):
        fisher_scores(model, errors, *utterance(model))
    handle.remove()
    fisher_scores(model, errors, *utterance(model))


def test_an_output_that_is_not_finite_is_refused() -> None:
    model = tiny_model()
    errors = rounding_errors(model, NEAREST, WIDTHS, {})
    with torch.no_grad():  # finite weights, an output that is not
        model.encoder.layers[0].feed_forward1.linear1.bias[0] = 3e38
        model.encoder.layers[0].feed_forward1.linear2.weight[:, 0] = 3e38
    with pytest.raises(MpqError, match="finite"):
        fisher_scores(model, errors, *utterance(model))


def test_a_weight_that_nothing_reads_has_no_score() -> None:
    model = tiny_model()
    model.extra = nn.Linear(3, 3)
    errors = rounding_errors(model, NEAREST, (2,), {})
    for output in ("ctc", "encoder"):
        with pytest.raises(MpqError, match=r"^extra\.weight: takes no part in the output"):
            fisher_scores(model, errors, *utterance(model), output=output)


def test_rounding_errors_are_what_is_stored_minus_what_was() -> None:
    model = tiny_model()
    grams = input_grams(model, [utterance(model, 90)])
    for rounding in ("nearest", "gptq"):
        spec = QuantSpec(8, granularity="group:16", rounding=rounding)
        told: list[float] = []
        errors = rounding_errors(model, WeightFormat(spec), (3, 2), grams, told.append)
        assert list(errors) == [ref.name for ref in model.weights()] and sum(told) == len(errors)
        for name, found in errors.items():
            weight = dict(model.named_parameters())[name].detach()
            for bits, error in zip((3, 2), found, strict=True):
                expected = fake_quantize(weight, replace(spec, bits=bits), grams[name]) - weight
                assert torch.equal(error, expected.flatten()) and not error.requires_grad
    name = next(iter(grams))
    with pytest.raises(MpqError, match=rf"^{name}: no calibration data reached it"):
        rounding_errors(model, WeightFormat(spec), (2,), {})


def test_typical_scores_by_hand() -> None:
    """Two layers, one width, utterances of 1, 2 and 4 frames with totals 10, 20 and 4000: 10, 10 and 1000 a frame."""
    sums = torch.tensor([[2.0, 8.0], [8.0, 12.0], [400.0, 3600.0]], dtype=torch.float64)[:, :, None]
    score, low, high = typical_scores(sums, torch.tensor([1, 2, 4]))
    typical = (10 * 10 * 1000) ** (1 / 3)
    shares = (0.2 + 0.4 + 0.1) / 3
    assert score.shape == low.shape == high.shape == (2, 1) and score.dtype == torch.float64
    assert float(score[0]) == pytest.approx(shares * typical)
    assert float(score.sum()) == pytest.approx(typical)
    logs = [math.log(total / typical) for total in (10, 10, 1000)]
    for row, own in enumerate(((0.2, 0.4, 0.1), (0.8, 0.6, 0.9))):
        mean = sum(own) / 3
        deviation = (sum((share / mean - 1 + log) ** 2 for share, log in zip(own, logs, strict=True)) / 2) ** 0.5
        factor = math.exp(4.302653 * deviation / 3**0.5)  # t of 2 degrees of freedom, from a table
        assert float(high[row]) == pytest.approx(mean * typical * factor, rel=1e-5)
        assert float(low[row]) == pytest.approx(mean * typical / factor, rel=1e-5)


def test_an_utterance_that_is_lost_decides_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    sums = torch.rand(20, 5, 3, generator=random, dtype=torch.float64)
    frames = torch.full((20,), 50)
    before, _, _ = typical_scores(sums, frames)
    sums[3] *= 1e6
    after, _, _ = typical_scores(sums, frames)
    torch.testing.assert_close(after / after.sum(dim=0), before / before.sum(dim=0))
    torch.testing.assert_close(after, before * 1e6 ** (1 / 20))
    alone, _, _ = typical_scores(sums[:, :, 1:2].contiguous(), frames)
    assert torch.equal(alone[:, 0], after[:, 1])  # a width does not depend on the others


def test_one_utterance_gives_no_interval_and_zeros_stay_zeros() -> None:
    sums = torch.tensor([[[6.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)
    score, low, high = typical_scores(sums, torch.tensor([3]))
    torch.testing.assert_close(score, torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert not low.any() and bool(high.isinf().all())
    both, low, high = typical_scores(sums.repeat(2, 1, 1), torch.tensor([3, 3]))
    assert both[:, 1].tolist() == low[:, 1].tolist() == high[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_interval_covers_the_score_in_95_of_100(spread: float) -> None:
    """Totals whose logarithms vary by `spread` and go with the shares; 4000 tables of 40 utterances side by side."""
    random = np.random.default_rng(1)
    common = random.normal(size=(40, 1, 4000))
    shares = np.clip(0.3 + 0.03 * common + 0.04 * random.normal(size=(40, 1, 4000)), 0, 1)
    sums = np.concatenate([shares, 1 - shares], axis=1) * np.exp(spread * common)
    _, low, high = typical_scores(torch.from_numpy(sums), torch.ones(40, dtype=torch.int64))
    assert 0.93 < float(((low[0] <= 0.3) & (high[0] >= 0.3)).double().mean()) < 0.97
