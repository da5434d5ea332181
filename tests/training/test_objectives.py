"""The objectives' parts against their losses, written out."""

import pytest
import torch
from tiny_models import small_model, some_features

from mpq.config import FinetuneConfig
from mpq.runtime import Processes
from mpq.training.distillation import DistillationLosses
from mpq.training.losses import joint, shares
from mpq.training.objectives import distilled, mixed_distillation, training_mode


def test_shares_of_the_heads() -> None:
    assert shares(("ctc", "attention"), 0.25) == {"ctc": 0.25, "attention": 0.75}
    assert shares(("transducer", "ctc"), 0.25) == {"transducer": 0.75, "ctc": 0.25}
    assert shares(("ctc",), 0.25) == {"ctc": 1.0}
    assert joint({"ctc": 4.0, "attention": 8.0}, ("ctc", "attention"), 0.25) == 7.0


def test_the_parts_of_a_distillation() -> None:
    ones = torch.ones(2)
    found = DistillationLosses(
        kl={"ctc": 6 * ones, "attention": 4 * ones},
        rows={"ctc": 3 * ones, "attention": 2 * ones},
        hidden=9 * ones,
        frames=3 * ones,
        transcripts={"ctc": ones},
    )
    values = {name: float(one) for name, one in distilled(found, Processes(0, 1), 2).items()}
    assert values == {"ctc_kl": 1.0, "attention_kl": 1.0, "hidden": 1.5}  # means over the rows, of two batches
    assert mixed_distillation(values, ("ctc", "attention"), 0.3, 2.0) == pytest.approx(4.0)
    assert mixed_distillation({"ctc_kl": 1.0}, ("ctc",), 0.3, 2.0) == 1.0
    assert found.each().tolist() == [20.0, 20.0]


@pytest.mark.parametrize("batch_norm", ["updated", "frozen"])
@pytest.mark.parametrize("dropout", [True, False])
def test_modes_of_a_model_that_imitates(batch_norm: str, dropout: bool) -> None:
    model = small_model()
    training_mode(model, FinetuneConfig(batch_norm=batch_norm, dropout=dropout))
    assert model.training == dropout and model.encoder.layers[0].conv.batch_norm.training == (batch_norm == "updated")
    features, lengths = some_features(30, 24)
    before = model.encoder.layers[0].conv.batch_norm.running_mean.clone()
    model.encode(features, lengths)
    changed = not torch.equal(before, model.encoder.layers[0].conv.batch_norm.running_mean)
    assert changed == (batch_norm == "updated")
