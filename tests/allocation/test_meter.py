"""Whole models measured by their bit-widths: each once, and the model as it was afterwards."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from mpq.allocation.meter import Meter, measuring, rounded_weights
from mpq.artifact.weights import WeightFormat
from mpq.journal import Journal
from mpq.models.base import AsrModel
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw

WIDTHS = (2, 4)


def rounded(model: AsrModel) -> dict[str, dict[int, Tensor]]:
    return rounded_weights(model, WeightFormat(QuantSpec(8)), WIDTHS, {}, quiet=True)


def test_rounded_weights_are_those_of_a_packed_file() -> None:
    model = tiny_model()
    state, found = model.state_dict(), rounded(model)
    assert list(found) == [ref.name for ref in model.weights()]
    for name, weights in found.items():
        assert set(weights) == {*WIDTHS, 16, 32}
        for bits in WIDTHS:
            assert torch.equal(weights[bits], fake_quantize(state[name], QuantSpec(bits)))
        assert torch.equal(weights[16], state[name].half().float()) and torch.equal(weights[32], state[name])


def test_the_model_has_its_weights_back(many_tones: Path) -> None:
    model = tiny_model()
    data = draw(model, many_tones, 1.0)
    weights = rounded(model)
    two = dict.fromkeys(weights, 2)
    with pytest.raises(KeyboardInterrupt), measuring(model, data) as joint:
        Meter(joint, weights).move_to(two)
        assert any(not torch.equal(model.state_dict()[name], weights[name][32]) for name in weights)
        raise KeyboardInterrupt
    own = tiny_model().state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())


def test_what_was_measured_is_not_measured_again(tmp_path: Path, many_tones: Path) -> None:
    """Not in the same run, and with a journal not in the next one; the times add up."""
    model = tiny_model()
    weights = rounded(model)
    four, two = dict.fromkeys(weights, 4), dict.fromkeys(weights, 2)
    journal = Journal(tmp_path / "a.journal", "work")
    journal.begin()
    looks: list[float] = []

    def clock() -> float:
        looks.append(len(looks) ** 2)
        return looks[-1]

    with measuring(model, draw(model, many_tones, 1.0)) as joint:
        meter = Meter(joint, weights, journal, clock)
        first = meter.kl(four)
        assert meter.is_known(four) and not meter.is_known(two)
        meter.move_to(four)
        assert meter.kl(four) is first and len(looks) == 2
        worse = meter.kl(two)
        assert meter.per_frame(worse) > meter.per_frame(first) > 0
        assert meter.seconds == (1 - 0) + (9 - 4)
        again = Meter(joint, weights, journal, clock)
        assert torch.equal(again.kl(four), first) and torch.equal(again.kl(two), worse) and len(looks) == 4
        assert again.seconds == meter.seconds
