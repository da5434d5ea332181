"""Learning rates by hand, the optimizer"s groups, precisions."""

import math

import pytest
import torch
from torch import nn

from mpq.config import TrainConfig
from mpq.training.optimization import Stepper, choose_precision, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("inverse_sqrt", {1: 0.25, 4: 1.0, 16: 0.5, 100: 0.2}),
        ("cosine", {1: 0.25, 4: 1.0, 52: 0.5, 28: (2 + math.sqrt(2)) / 4, 100: 0.0, 130: 0.0}),
        ("linear", {1: 0.25, 3: 0.75, 4: 1.0, 52: 0.5, 76: 0.25, 100: 0.0, 101: 0.0}),
        ("constant", {1: 0.25, 4: 1.0, 5: 1.0, 100: 1.0}),
    ],
)
def test_learning_rates(schedule: str, expected: dict[int, float]) -> None:
    for step, rate in expected.items():
        assert learning_rate(step, 100, 3.0, 4, schedule) == pytest.approx(3 * rate, abs=1e-12)


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (10, 10), (20, 10), (0, 1), (1, 1)])
def test_learning_rates_at_the_edges(schedule: str, warmup: int, total: int) -> None:
    rates = [learning_rate(step, total, 1.0, warmup, schedule) for step in range(1, total + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    peak = max(1, warmup)
    falling = [learning_rate(step, total, 1.0, warmup, schedule) for step in range(peak, 40)]
    assert falling == sorted(falling, reverse=True)
    if not warmup and schedule == "inverse_sqrt":
        assert rates[0] == 1.0


def test_the_optimizer_decays_matrices_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(2, 4), nn.Conv1d(4, 4, 3))
    model[0].weight.requires_grad_(False)
    model.register_parameter("pos_bias_u", nn.Parameter(torch.zeros(2, 2)))
    optimizer = make_optimizer(model, 0.1, (0.8, 0.9))
    decay = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    named = {name: decay.get(id(one)) for name, one in model.named_parameters()}
    assert named == {
        "0.weight": None,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "3.weight": 0.1,
        "3.bias": 0.0,
        "pos_bias_u": 0.0,
    }
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_precisions_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu)[0] is None and choose_precision("float32", cpu)[0] is None
    assert choose_precision("bfloat16", cpu)[0] is torch.bfloat16
    assert not choose_precision("bfloat16", cpu)[1].is_enabled()
    dtype, scaler = choose_precision("float16", cpu)
    assert dtype is torch.float16 and scaler.is_enabled()


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_an_update_by_hand(share: float) -> None:
    """Of two gradients that add up to the norm 5, clipped to 0.5, at the second of four rates of the warm-up."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    options = TrainConfig(learning_rate=0.4, warmup_steps=4, clip_norm=0.5, precision="float32")
    stepper = Stepper(torch.optim.SGD([{"params": [weight], "share": share}], lr=0.0), options, 10, weight.device)
    weight.grad = torch.tensor([7.0, 7.0])  # of the update before
    assert stepper.begin(2) == pytest.approx(0.2) and not stepper.is_mixed and not stepper.may_overflow
    stepper.backward((weight * torch.tensor([3.0, 1.0])).sum())
    stepper.backward((weight * torch.tensor([0.0, 3.0])).sum())
    norm = stepper.gradient_norm()
    assert float(norm) == 5
    stepper.step(norm)
    expected = torch.tensor([1.0, 2.0]) - 0.2 * share * torch.tensor([0.3, 0.4])
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=0)
