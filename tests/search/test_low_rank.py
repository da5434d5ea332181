"""Factored feed-forward matrices: the best of their rank by least squares, nested, in whole models of both families."""

import copy

import pytest
import torch
from tiny_models import log_probs, three_features, tiny_hybrid, tiny_model
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.reshaping import feed_forwards, matrix, sliced
from mpq.quantization.gptq import DAMPING
from mpq.search.low_rank import factored, low_rank_factors
from mpq.sensitivity.statistics import input_grams

RANKS = [(4, 6), (5, 3)]


def plain(family: str) -> AsrModel:
    """Returns a model of 2 blocks, none of its modules factored."""
    return tiny_model(ffn2_width=24) if family == "nemo" else tiny_hybrid(ffn_width=[32, 20], ffn_rank=0)


def inputs(rows: int = 60, columns: int = 9) -> Tensor:
    """Returns (rows, columns) of correlated float64 inputs of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, columns) @ mix


def weight(rows: int = 7, columns: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def alternating_least_squares(x: Tensor, w: Tensor, rank: int) -> float:
    """Returns the least ||x w' - x b' a'||^2 that solving for a and b in turn finds, the best of three starts."""
    y, best = x @ w.T, torch.inf
    for seed in range(3):
        b = torch.randn(rank, w.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(400):
            a = torch.linalg.lstsq(x @ b.T, y).solution.T  # (outputs, rank)
            b = torch.linalg.pinv(a) @ torch.linalg.lstsq(x, y).solution.T
        best = min(best, float((y - x @ b.T @ a.T).square().sum()))
    return best


@pytest.mark.parametrize("rank", [1, 3, 6, 7])
@pytest.mark.parametrize("with_data", [False, True])
def test_no_other_factors_are_better(rank: int, with_data: bool) -> None:
    w, x, gram = weight(), torch.eye(9, dtype=torch.float64), None
    if with_data:
        x = inputs()
        gram = (x.T @ x).float()[None]
        x = torch.cat((x, (DAMPING * gram[0].diagonal().mean()).sqrt() * torch.eye(9)))  # damping: small inputs more
    a, b = (factor.double() for factor in low_rank_factors(w.float(), rank, gram))
    error = float((x @ (w - a @ b).T).square().sum())
    scale = float((x @ w.T).square().sum())
    assert abs(error - alternating_least_squares(x, w, rank)) < 1e-5 * scale
    generator = torch.Generator().manual_seed(5)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            a2 = a + size * torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b2 = b + size * torch.randn(b.shape, generator=generator, dtype=torch.float64)
            assert float((x @ (w - a2 @ b2).T).square().sum()) > error - 1e-6 * scale


def test_factors_by_hand() -> None:
    """3 e1 f2' + 1 e2 f1' has these singular values; with inputs ten times larger along f1 the order turns round."""
    w = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    a, b = low_rank_factors(w, 1)
    torch.testing.assert_close(a @ b, torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    assert float(a.norm()) == pytest.approx(3**0.5) and float(b.norm()) == pytest.approx(3**0.5)
    a, b = low_rank_factors(w, 1, torch.diag(torch.tensor([100.0, 1.0]))[None])
    torch.testing.assert_close(a @ b, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    a, b = low_rank_factors(w, 2, torch.diag(torch.tensor([100.0, 1.0]))[None])
    torch.testing.assert_close(a @ b, w)


@pytest.mark.parametrize("with_data", [False, True])
def test_factors_are_nested_and_of_one_size(with_data: bool) -> None:
    gram = (inputs().T @ inputs()).float()[None] if with_data else None
    full = low_rank_factors(weight().float(), 7, gram)
    for rank in range(1, 7):
        a, b = low_rank_factors(weight().float(), rank, gram)
        torch.testing.assert_close(a, full[0][:, :rank])
        torch.testing.assert_close(b, full[1][:rank])
    squares = full[0].square().sum(dim=0)
    assert squares.tolist() == sorted(squares.tolist(), reverse=True)
    if not with_data:
        values = torch.diag(torch.linalg.svdvals(weight())).float()
        torch.testing.assert_close(full[0].T @ full[0], values, atol=1e-5, rtol=0)
        torch.testing.assert_close(full[1] @ full[1].T, values, atol=1e-5, rtol=0)


def test_a_zero_weight_has_zero_factors() -> None:
    a, b = low_rank_factors(torch.zeros(4, 3), 2)
    assert not a.any() and not b.any() and a.shape == (4, 2) and b.shape == (2, 3)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize(
    "model", [plain("nemo"), plain("mpq"), tiny_model(use_bias=False)], ids=["nemo", "mpq", "bare"]
)
def test_at_full_rank_the_function_stays(model: AsrModel, with_data: bool) -> None:
    before = copy.deepcopy(model.state_dict())
    grams = input_grams(model, three_features(model)) if with_data else None
    found = factored(model, [(16, 16)] * 2, grams)
    assert type(found) is type(model)
    assert [rank for block in found.encoder.options.ffn_shapes() for _, rank in block] == [16] * 4
    assert (log_probs(found) - log_probs(model)).abs().max() < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("family", ["nemo", "mpq"])
def test_a_slice_of_the_ranks_is_the_model_of_that_rank(family: str, with_data: bool) -> None:
    model = plain(family)
    grams = input_grams(model, three_features(model)) if with_data else None
    small = factored(model, RANKS, grams)
    nested = sliced(factored(model, [(12, 12)] * 2, grams), small.encoder.options.ffn_shapes())
    assert (log_probs(small) - log_probs(nested)).abs().max() < 1e-5
    assert (log_probs(small) - log_probs(model)).abs().max() > 1e-2


def test_data_keep_the_output() -> None:
    """With statistics, the error of every module's own output on these data is smaller than without."""
    model = plain("nemo")
    grams = input_grams(model, three_features(model))
    for (name, module), without, with_data in zip(
        feed_forwards(model).items(),
        feed_forwards(factored(model, RANKS)).values(),
        feed_forwards(factored(model, RANKS, grams)).values(),
        strict=True,
    ):
        for linear in ("linear1", "linear2"):
            w, gram = matrix(getattr(module, linear)).detach(), grams[f"{name}.{linear}.weight"][0]
            errors = [w - matrix(getattr(one, linear)).detach() for one in (without, with_data)]
            plainly, by_data = (float((error @ gram @ error.T).trace()) for error in errors)
            assert by_data < plainly
            assert errors[0].norm() < errors[1].norm()


def test_what_is_factored_already_is_factored_anew() -> None:
    model = plain("nemo")
    twice, once = factored(factored(model, [(10, 10)] * 2), RANKS), factored(model, RANKS)
    assert (log_probs(twice) - log_probs(once)).abs().max() < 1e-4
    first = factored(model, [(10, 10)] * 2)
    again = factored(first, [(10, 10)] * 2, input_grams(first, three_features(first)))
    assert (log_probs(again) - log_probs(first)).abs().max() < 1e-4


def test_rank_0_leaves_a_module_as_it_is() -> None:
    model = factored(plain("nemo"), [(0, 6), (0, 0)])
    assert model.encoder.options.ffn_shapes() == [((32, 0), (24, 6)), ((32, 0), (24, 0))]
    again = factored(model, [(0, 0), (5, 0)], input_grams(model, three_features(model)))
    assert again.encoder.options.ffn_shapes() == [((32, 0), (24, 6)), ((32, 5), (24, 0))]
    state = model.state_dict()
    changed = [
        name for name, one in again.state_dict().items() if name not in state or not torch.equal(one, state[name])
    ]
    assert changed and all(name.startswith("encoder.layers.1.feed_forward1.") for name in changed)


NAME = "encoder.layers.1.feed_forward2.linear2.weight"


@pytest.mark.parametrize(
    ("ranks", "change", "message"),
    [
        ([(4, 4)], None, "ranks: expected one pair for each of 2 blocks, got 1"),
        (
            [(4, 17), (4, 4)],
            None,
            r"layers\.0\.feed_forward2: rank: expected 0 .* or 1 to 16, its smaller side, got 17",
        ),
        ([(4, 4), (-1, 4)], None, r"layers\.1\.feed_forward1: rank: .* got -1"),
        (RANKS, lambda grams: grams.pop(NAME), f"{NAME}: no statistics of its inputs"),
        (RANKS, lambda grams: grams[NAME].zero_(), f"{NAME}: no calibration data reached it"),
        (RANKS, lambda grams: grams[NAME].fill_(torch.nan), f"{NAME}: .* not finite"),
        (RANKS, lambda grams: grams.update({NAME: torch.eye(9)[None]}), rf"{NAME}: .*\(1, 9, 9\) do not fit"),
    ],
)
def test_what_cannot_be_factored(ranks: list, change, message: str) -> None:
    model = plain("nemo")
    grams = input_grams(model, three_features(model))
    if change:
        change(grams)
    with pytest.raises(MpqError, match=message):
        factored(model, ranks, grams)


def test_weights_that_are_not_finite() -> None:
    model = plain("nemo")
    model.get_parameter(NAME).data[3, 3] = torch.nan
    with pytest.raises(MpqError, match=f"{NAME}: expected finite weights"):
        factored(model, RANKS)
