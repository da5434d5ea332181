"""The order of hidden units: the greedy choice against masked outputs, and the function that it leaves unchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import large, log_probs, three_features, tiny_model
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.reshaping import feed_forwards, matrix, sliced
from mpq.search.importance import greedy_order, order_units, unit_importance
from mpq.sensitivity.statistics import input_grams


def hidden_units(model: AsrModel, name: str) -> Tensor:
    """Returns the (M, H) activations of a module for all frames of the data."""
    found = []
    module = feed_forwards(model)[name]
    hook = module.register_forward_hook(lambda own, args, _: found.append(F.silu(own.linear1(args[0]))[0]))
    with torch.no_grad():
        for features, lengths in three_features(model):
            model.encode(features, lengths)
    hook.remove()
    return torch.cat(found)


def cost(hidden: Tensor, second: Tensor, left_out: list[int]) -> float:
    """Returns the squared change of the module's output when units are left out."""
    return float((hidden.double()[:, left_out] @ second.double()[:, left_out].T).square().sum())


def plain_greedy(hidden: Tensor, second: Tensor, count: int) -> list[int]:
    """Returns the first units of the greedy order, each found by trying all."""
    left, order = list(range(hidden.shape[1])), []
    for _ in range(count):
        best = min(left, key=lambda unit: cost(hidden, second, [other for other in left if other != unit]))
        left.remove(best)
        order.append(best)
    return order


@pytest.mark.parametrize("family", ["nemo", "mpq"])
def test_scores_are_the_greedy_order_of_masked_outputs(family: str) -> None:
    model = large(family)  # whole and factored modules
    scores = unit_importance(model, input_grams(model, three_features(model)))
    assert len(scores) == 2
    for (name, module), one in zip(feed_forwards(model).items(), [s for pair in scores for s in pair], strict=True):
        units = len(matrix(module.linear1))
        assert sorted(one.tolist()) == list(range(units))
        expected = plain_greedy(hidden_units(model, name), matrix(module.linear2).detach(), 8)
        assert one.argsort(descending=True)[:8].tolist() == expected, name


def test_greedy_order_by_hand() -> None:
    """Units 1 and 3 cancel each other, so neither is needed; 0 adds much; 2 adds a little; 4 adds nothing."""
    h = torch.tensor([[1.0, 5.0, 0.5, 5.0, 0.0]])
    w = torch.tensor([[3.0, 1.0, 1.0, -1.0, 9.0]])
    contributions = (h * w)[0]  # of one frame to one output
    order = greedy_order(torch.outer(contributions, contributions)).tolist()
    assert order[:2] == [0, 2] and order[2] == 4
    assert greedy_order(torch.zeros(4, 4)).tolist() == [0, 1, 2, 3]
    assert greedy_order(torch.eye(3)).tolist() == [0, 1, 2]
    assert greedy_order(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).tolist() == [1, 2, 0]
    assert greedy_order(torch.ones(1, 1)).tolist() == [0]


def random_scores(model: AsrModel) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    each = iter([torch.rand(len(matrix(one.linear1)), generator=generator) for one in feed_forwards(model).values()])
    return list(zip(each, each, strict=True))


@pytest.mark.parametrize(
    "model", [large("nemo"), large("mpq"), tiny_model(use_bias=False)], ids=["nemo", "mpq", "bare"]
)
def test_the_function_stays_and_the_units_move(model: AsrModel) -> None:
    changed = copy.deepcopy(model)
    scores = random_scores(model)
    order_units(changed, scores)
    assert (log_probs(changed) - log_probs(model)).abs().max() < 1e-5
    flat = [one for pair in scores for one in pair]
    for old, new, one in zip(feed_forwards(model).values(), feed_forwards(changed).values(), flat, strict=True):
        for place, unit in enumerate(sorted(range(len(one)), key=lambda k, s=one: -float(s[k]))):
            torch.testing.assert_close(matrix(new.linear1)[place], matrix(old.linear1)[unit])
            torch.testing.assert_close(matrix(new.linear2)[:, place], matrix(old.linear2)[:, unit])
    names = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, changed.state_dict()[name])]
    moved = {"linear1.weight", "linear1.bias", "linear1.outer.weight", "linear1.outer.bias", "linear2.weight"}
    assert names and {name.split("feed_forward")[1][2:] for name in names} <= moved | {"linear2.inner.weight"}


def test_what_is_ordered_is_in_order() -> None:
    model = large("mpq")
    order_units(model, unit_importance(model, input_grams(model, three_features(model))))
    for pair in unit_importance(model, input_grams(model, three_features(model))):
        for one in pair:
            assert one.argsort(descending=True)[:6].tolist() == list(range(6))


def test_the_first_units_are_worth_more_than_the_last() -> None:
    """Of the reordered model half of the units keeps more of each module's output than the other half."""
    model = tiny_model()
    order_units(model, unit_importance(model, input_grams(model, three_features(model))))
    for name, module in feed_forwards(model).items():
        hidden, second = hidden_units(model, name), matrix(module.linear2).detach()
        assert cost(hidden, second, list(range(16, 32))) < 0.5 * cost(hidden, second, list(range(16)))
    assert sliced(model, [((16, 0), (16, 0))] * 2).encoder.layers[0].feed_forward1.linear1.weight.shape == (16, 16)


def test_equal_scores_keep_the_order() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    order_units(model, [(torch.zeros(32), torch.ones(32))] * 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    score = torch.zeros(32)
    score[[5, 9]] = 1.0
    order_units(model, [(score, score)] * 2)
    order = [5, 9, *(k for k in range(32) if k not in (5, 9))]
    name = "encoder.layers.1.feed_forward2.linear1.bias"
    assert torch.equal(model.state_dict()[name], before[name][order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores[1][1].fill_(torch.nan), r"layers\.1\.feed_forward2: scores: got NaN for 32 of 32 units"),
        (lambda scores: scores.pop(), "scores: expected those of 4 feed-forward modules, got 2"),
        (lambda scores: scores.__setitem__(0, (torch.zeros(31), torch.zeros(32))), r"32 units, got shape \(31,\)"),
    ],
)
def test_scores_that_do_not_fit(change, message: str) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    scores = random_scores(model)
    change(scores)
    with pytest.raises(MpqError, match=message):
        order_units(model, scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


NAME = "encoder.layers.1.feed_forward1.linear2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grams: grams.pop(NAME), "no statistics of its inputs; collect them from this model"),
        (lambda grams: grams[NAME].fill_(torch.inf), "expected finite weights and statistics"),
        (lambda grams: grams.update({NAME: torch.eye(31)[None]}), r"shape \(1, 31, 31\) do not fit 32 inputs"),
    ],
)
def test_statistics_that_do_not_fit(change, message: str) -> None:
    model = tiny_model()
    grams = input_grams(model, three_features(model))
    change(grams)
    with pytest.raises(MpqError, match=f"{NAME}: .*{message}"):
        unit_importance(model, grams)
