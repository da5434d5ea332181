"""The supernet: sums of nested candidates against separate modules, paths against sliced models, sizes, choices."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_supernets import FAMILIES, SPACES, architectures, model_of, output, with_logits
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.conformer import FeedForward
from mpq.models.reshaping import FfnShapes, feed_forwards, sliced
from mpq.search.space import ModuleSpace
from mpq.search.supernet import NestedFeedForward, Supernet, budget, nested_mask
from mpq.speech.augment import generator

# ---- sums of candidates against modules of their own


def candidate(module: FeedForward, width: int, rank: int) -> FeedForward:
    """Returns a module of its own with a copy of the leading corner of each tensor."""
    new = FeedForward(module.linear2.outer.out_features if rank else module.linear2.out_features, width, rank, True, 0)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.copy_(module.get_parameter(name)[tuple(slice(size) for size in parameter.shape)])
    return new


def explicit_sum(module: FeedForward, x: Tensor, widths: dict[int, Tensor], ranks: dict[int, Tensor]) -> Tensor:
    """Returns Eq. 2 term by term, from modules that are built apart.

    Each matrix of a factored module is a layer with candidates of its own: ranks are summed at the output of each.
    """

    def mixed(which: str, width: int, inputs: Tensor) -> Tensor:
        """Returns the sum over the ranks of one of the two matrices."""
        return sum(share * getattr(candidate(module, width, rank), which)(inputs) for rank, share in ranks.items())

    total = torch.zeros(())
    for width, share in widths.items():
        total = total + share * mixed("linear2", width, nn.functional.silu(mixed("linear1", width, x)))
    return total


def summed(module: NestedFeedForward, x: Tensor, widths: dict[int, Tensor], ranks: dict[int, Tensor]) -> Tensor:
    masks = [
        nested_mask(list(one), torch.stack(list(one.values()))) if len(one) > 1 else None for one in (widths, ranks)
    ]
    module.be_sum(*masks)
    return module(x)


CASES = [
    ((3, 8, 30), (0,)),
    ((30,), (1, 4, 9)),
    ((2, 30), (2, 5, 6)),
    ((1, 2), (1, 2)),
    (tuple(range(1, 26)), (0,)),
    ((30,), (7,)),
]


@pytest.mark.parametrize(("widths", "ranks"), CASES)
def test_the_sum_is_that_of_separate_modules(widths: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    module = FeedForward(10, widths[-1], ranks[-1], True, 0.0)
    nested = NestedFeedForward(module)
    x = torch.randn(2, 6, 10)
    alphas = [torch.randn(len(one), requires_grad=True) for one in (widths, ranks)]

    def shares() -> list[dict[int, Tensor]]:
        return [dict(zip(one, a.softmax(0), strict=True)) for one, a in zip((widths, ranks), alphas, strict=True)]

    found, expected = summed(nested, x, *shares()), explicit_sum(module, x, *shares())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(found.shape)
    grads = torch.autograd.grad((found * direction).sum(), alphas, allow_unused=True)
    others = torch.autograd.grad((expected * direction).sum(), alphas, allow_unused=True)
    for one, other, candidates in zip(grads, others, (widths, ranks), strict=True):
        if len(candidates) > 1:
            assert other.abs().max() > 1e-4
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_sum_has_the_gradients_of_the_weights() -> None:
    """Against the sum of functions of the very same weights."""
    torch.manual_seed(1)
    module = FeedForward(10, 12, 0, True, 0.0)
    nested, x = NestedFeedForward(module), torch.randn(4, 10)
    share = torch.tensor([0.2, 0.5, 0.3])
    found = summed(nested, x, dict(zip((3, 7, 12), share, strict=True)), {0: torch.ones(())})
    first, second = module.linear1, module.linear2
    expected = sum(
        share[i] * (nn.functional.silu(x @ first.weight[:d].T + first.bias[:d]) @ second.weight[:, :d].T + second.bias)
        for i, d in enumerate((3, 7, 12))
    )
    torch.testing.assert_close(found, expected)
    parameters = list(module.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_modules_have_dropout_in_training_alone() -> None:
    torch.manual_seed(0)
    nested, x = NestedFeedForward(FeedForward(6, 40, 0, True, 0.5)), torch.randn(3, 6)
    whole = nested.eval()(x)
    for change in (nested.be_whole, lambda: nested.be_one(30, 0), lambda: nested.be_sum(torch.rand(40), None)):
        change()
        assert torch.equal(nested.eval()(x), nested(x))
        assert not torch.allclose(nested.train()(x), nested(x))
    nested.be_whole()
    nested.train()
    mean = torch.stack([nested(x) for _ in range(3000)]).mean(0)  # dropout keeps the mean of a linear map
    assert (mean - whole).abs().max() < 0.05


@pytest.mark.parametrize("candidates", [(1,), (4,), (1, 2), (1, 5, 6, 20), (3, 4, 5)])
def test_the_mask_by_its_definition(candidates: tuple[int, ...]) -> None:
    weights = torch.rand(len(candidates), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = [
        sum(float(weight) for size, weight in zip(candidates, weights, strict=True) if size > k)
        for k in range(candidates[-1])
    ]
    assert nested_mask(candidates, weights).tolist() == pytest.approx(expected)


# ---- the whole model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", SPACES)
def test_a_path_is_the_sliced_model(family: str, space: str) -> None:
    model = model_of(family, space)
    before = output(model)
    every = architectures(space)
    chosen = [every[0], every[-1], *(every[index] for index in np.random.default_rng(0).integers(len(every), size=4))]
    expected = [output(sliced(model, shapes)) for shapes in chosen]
    state = {name: one.clone() for name, one in model.state_dict().items()}
    supernet = Supernet(model, SPACES[space])
    assert model.state_dict().keys() == state.keys()  # so that checkpoints are those of the model
    for shapes, other in zip(chosen, expected, strict=True):
        supernet.be_one(shapes)
        torch.testing.assert_close(output(model), other, atol=1e-5, rtol=1e-5)
    assert (expected[0] - before).abs().max() > 1e-2
    supernet.be_whole()
    torch.testing.assert_close(output(model), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_a_sum_with_one_weight_is_a_path(space: str) -> None:
    supernet = Supernet(model_of("mpq", space), SPACES[space])
    for shapes in architectures(space)[::5]:
        flat = [shape for block in shapes for shape in block]
        with torch.no_grad():
            for index, (width, rank) in enumerate(flat):
                for logits, candidates, size in (
                    (supernet.width_logits[index], supernet.space[index].widths, width),
                    (supernet.rank_logits[index], supernet.space[index].ranks, rank),
                ):
                    logits.copy_(torch.tensor([50.0 if one == size else -50.0 for one in candidates]))
        supernet.be_one(shapes)
        expected = output(supernet.model)
        supernet.be_sum(1.0, None)
        torch.testing.assert_close(output(supernet.model), expected, atol=1e-5, rtol=1e-5)
        assert supernet.best() == shapes
        count = sum(supernet.counts[i][one.widths.index(w)][one.ranks.index(r)]
                    for i, (one, (w, r)) in enumerate(zip(supernet.space, flat, strict=True)))  # fmt: skip
        assert supernet.expected_millions().item() == pytest.approx(count / 1e6, rel=1e-5)


def test_candidates_that_the_model_has_not() -> None:
    with pytest.raises(MpqError, match=r"expected modules of the largest candidates, .*got \[\(32, 0\)"):
        Supernet(model_of("nemo", "widths"), SPACES["both"])


def test_a_single_candidate_is_no_choice() -> None:
    space = [(ModuleSpace((32,), (0,)), ModuleSpace((32,), (0,)))] * 2
    supernet = Supernet(tiny_model(), space)
    expected = output(supernet.model)
    assert supernet.arch_logits() == [] and supernet.best() == [((32, 0), (32, 0))] * 2
    supernet.be_sum(0.1, generator(0, 0, "", ""))
    torch.testing.assert_close(output(supernet.model), expected)


# ---- paths


def test_paths_are_drawn_uniformly_and_apart() -> None:
    supernet, draws = Supernet(model_of("mpq", "both"), SPACES["both"]), 2000
    drawn = []
    for step in range(draws):
        supernet.be_sampled(3, step)
        drawn.append([(one._width, one._rank) for one in supernet.nested])
    choices = [list(itertools.product(one.widths, one.ranks)) for one in supernet.space]
    for index, options in enumerate(choices):
        counts = np.array([sum(one[index] == option for one in drawn) for option in options])
        assert counts.sum() == draws
        assert (
            (counts - draws / len(options)) ** 2 / (draws / len(options))
        ).sum() < 25  # chi-square, 5 degrees or fewer
    for first, second in itertools.combinations(range(4), 2):  # pairs of modules
        pairs = itertools.product(choices[first], choices[second])
        counts = np.array([sum((one[first], one[second]) == pair for one in drawn) for pair in pairs])
        assert ((counts - draws / len(counts)) ** 2 / (draws / len(counts))).sum() < 2 * len(counts) + 25


def test_the_same_seed_and_step_draw_the_same_path() -> None:
    supernet = Supernet(model_of("mpq", "both"), SPACES["both"])

    def path(seed: int, step: int) -> list[tuple[int, int]]:
        supernet.be_sampled(seed, step)
        return [(one._width, one._rank) for one in supernet.nested]

    paths = {(seed, step): path(seed, step) for seed in range(3) for step in range(8)}
    assert all(path(*key) == one for key, one in reversed(paths.items()))
    for seed in (1, 2):
        assert [paths[seed, step] for step in range(8)] != [paths[0, step] for step in range(8)]
    assert len({tuple(one) for one in paths.values()}) > 12
    supernet.be_sum(1.0, None)
    supernet.be_one(architectures("both")[0])  # nothing of what was before is left
    assert all(one._unit_mask is None and one._rank_mask is None for one in supernet.nested)


# ---- sizes and the choice


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", SPACES)
def test_sizes_are_those_of_sliced_models(family: str, space: str) -> None:
    model = model_of(family, space)
    every = architectures(space)
    totals = {index: sliced(model, every[index]).parameter_counts()["total"] for index in range(0, len(every), 3)}
    supernet = Supernet(model, SPACES[space])
    for index, total in totals.items():
        flat = [shape for block in every[index] for shape in block]
        counts = [
            table[one.widths.index(width)][one.ranks.index(rank)]
            for table, one, (width, rank) in zip(supernet.counts, supernet.space, flat, strict=True)
        ]
        assert supernet.rest + sum(counts) == total


def likelihoods(supernet: Supernet, every: Sequence[FfnShapes]) -> list[float]:
    """Returns the probability of each architecture."""
    found = []
    for shapes in every:
        total = 1.0
        for (width, rank), one, (widths, ranks) in zip(
            [shape for block in shapes for shape in block], supernet.space, supernet.probabilities(), strict=True
        ):
            total *= widths[one.widths.index(width)] * ranks[one.ranks.index(rank)]
        found.append(total)
    return found


@pytest.mark.parametrize("space", SPACES)
def test_expected_size_and_choice_against_all_architectures(space: str) -> None:
    model = model_of("mpq", space)
    every = architectures(space)
    totals = [sliced(model, shapes).parameter_counts()["total"] for shapes in every]
    supernet = with_logits(Supernet(model, SPACES[space]), seed=4)
    shares = likelihoods(supernet, every)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-5)
    expected = sum(share * (total - supernet.rest) for share, total in zip(shares, totals, strict=True)) / 1e6
    assert supernet.expected_millions().item() == pytest.approx(expected, rel=1e-5)
    supernet.expected_millions().backward()
    assert all(one.grad.abs().max() > 0 for one in supernet.arch_logits())

    assert supernet.best() == every[int(np.argmax(shares))]
    steps = sorted(set(totals))
    for most in (*steps, *(one + 1 for one in steps), *(one - 1 for one in steps[1:]), 10**9):
        fitting = [
            (share, -total, shapes) for share, total, shapes in zip(shares, totals, every, strict=True) if total <= most
        ]
        share, _, shapes = max(fitting, key=lambda one: one[:2])
        found = supernet.best(most)
        assert likelihoods(supernet, [found])[0] == pytest.approx(share, rel=1e-6)
        assert totals[every.index(found)] <= most
        if [one[0] for one in fitting if one[0] > share * (1 - 1e-9)] == [share]:
            assert found == shapes
    assert supernet.best(10**9) == supernet.best()
    with pytest.raises(MpqError, match=f"expected at least {steps[0] - supernet.rest}"):
        supernet.best(steps[0] - 1)


@pytest.mark.parametrize("space", SPACES)
def test_the_budget_of_a_target(space: str) -> None:
    """To the parameter: what the message says to be possible is; and told of whatever model the search begins with."""
    model = model_of("mpq", space)
    smallest = sliced(model, architectures(space)[0]).parameter_counts()["total"]
    for one in (model, sliced(model, architectures(space)[0])):
        for extra in range(300):  # 12.345 * 1e3 and the like are not whole
            text = f"{(smallest + extra) / 1e6:.6f}"
            assert budget(one, SPACES[space], float(text)) == smallest + extra
        assert budget(one, SPACES[space], (smallest + 0.9) / 1e6) == smallest
        with pytest.raises(MpqError, match=f"target_millions: expected {smallest / 1e6:.6f} or more.* got 0.0010"):
            budget(one, SPACES[space], 0.001)
        with pytest.raises(MpqError, match=f"target_millions: expected {smallest / 1e6:.6f} or more"):
            budget(one, SPACES[space], (smallest - 1) / 1e6)


def test_of_equally_probable_architectures_the_smallest_is_chosen() -> None:
    supernet = Supernet(model_of("mpq", "both"), SPACES["both"])
    assert supernet.best() == supernet.best(10**9) == architectures("both")[0]


def test_names_of_the_modules_are_those_of_the_model() -> None:
    """In the order of the space."""
    model = model_of("nemo", "widths")
    supernet = Supernet(model, SPACES["widths"])
    assert list(feed_forwards(model).values()) == supernet.nested
    assert [module.linear1.out_features for module in supernet.nested] == [32, 24, 20, 32]
