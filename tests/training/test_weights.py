"""The training of all weights: which epochs are averaged, patience, semi-orthogonal factors, CTC alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import PLAIN, CrashError, fails_at, recipe, speech, updates

from mpq.loading import load_model
from mpq.training import objectives
from mpq.training import weights as weight_loop
from mpq.training.orthogonal import constrained_factors, orthogonality_error
from mpq.training.run import train

__all__ = ["speech"]  # a fixture


def held_out(patch: pytest.MonkeyPatch, *results: tuple[float, float]) -> None:
    """Lets dev have these losses and WERs, one after the other, then the last again and again."""
    left = list(results)
    patch.setattr(objectives, "held_out_errors", lambda *_: left.pop(0) if len(left) > 1 else left[0])


def keep_weights(patch: pytest.MonkeyPatch) -> dict[int, dict[str, np.ndarray]]:
    """Returns what will have the weights of every epoch, whatever becomes of the files."""
    kept: dict[int, dict[str, np.ndarray]] = {}
    keep = weight_loop.WeightTrainer._write_candidate

    def keeping(self: Any) -> list[int]:
        state = self.model.state_dict()
        kept[self.epochs[-1].epoch] = {name: one.double().numpy().copy() for name, one in state.items()}
        return keep(self)

    patch.setattr(weight_loop.WeightTrainer, "_write_candidate", keeping)
    return kept


def assert_mean(out: Path, states: Sequence[dict[str, np.ndarray]]) -> None:
    for name, tensor in load_file(out / "model.safetensors").items():
        if name != "tokenizer":
            expected = np.mean([state[name] for state in states], axis=0)
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("select", "results", "expected"),
    [
        ("wer", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.3), (9, 0.3)], (2, 3)),
        ("wer", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.31), (9, 0.3)], (2,)),
        ("wer", [(4, 0.3), (3, 0.3), (2, 0.3), (1, 0.4), (9, 0.2), (9, 0.3)], (2, 3)),
        ("loss", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (1, 0.9), (1, 0.3)], (1, 2)),
        ("loss", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (1.1, 0.1), (1, 0.3)], (1,)),
        ("last", [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.3), (9, 0.6)], (3, 4)),
    ],
)
def test_which_epochs_are_averaged(
    select: str,
    results: list[tuple[float, float]],
    expected: tuple[int, ...],
    speech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four epochs, then the average and the best one alone, which takes its place where it is better on dev."""
    held_out(monkeypatch, *results)
    kept = keep_weights(monkeypatch)
    result = train(
        recipe(speech, **PLAIN, train__epochs=4, train__select=select, train__batch_frames=4000), tmp_path, quiet=True
    )
    assert result.averaged == expected
    assert (result.dev_loss, result.dev_wer) == results[4 if len(expected) == 2 else 5]
    assert len(kept) == 4
    assert_mean(tmp_path, [kept[epoch] for epoch in expected])


def test_without_dev_the_last_epochs_are_averaged(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep_weights(monkeypatch)
    options = PLAIN | {"data__dev": None, "train__select": "last", "train__batch_frames": 4000}
    result = train(recipe(speech, **options, train__epochs=3, train__average=5), tmp_path, quiet=True)
    assert result.averaged == (1, 2, 3) and result.dev_loss is result.dev_wer is None
    assert_mean(tmp_path, list(kept.values()))


def test_patience(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch 2 is the best (3 has its WER and a higher loss); it is waited for two more."""
    held_out(monkeypatch, (1, 0.5), (2, 0.4), (2.1, 0.4), (1, 0.45), (1, 0.1))
    result = train(
        recipe(speech, **PLAIN, train__epochs=9, train__patience=2, train__batch_frames=4000), tmp_path, quiet=True
    )
    assert len(result.epochs) == 4


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_on_dev_that_is_not_finite_counts_as_none(
    loss: float, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held_out(monkeypatch, (1, 0.4), (loss, 0.4), (3, 0.4), (loss, 0.4))
    options = recipe(speech, **PLAIN, train__epochs=3, train__average=2, train__batch_frames=4000)
    result = train(options, tmp_path, quiet=True)
    assert [one.dev_loss for one in result.epochs] == [1, None, 3] and result.averaged == (1, 3)
    assert result.dev_loss is None and result.dev_wer == 0.4
    assert f"the loss on the held-out data is {loss}; it counts as none" in caplog.text


def test_an_average_whose_loss_is_not_finite_is_not_taken(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out(monkeypatch, (math.nan, 0.4), (2, 0.4), (1, 0.4), (math.nan, 0.4), (1, 0.4))
    options = recipe(speech, **PLAIN, train__epochs=3, train__select="loss", train__batch_frames=4000)
    result = train(options, tmp_path, quiet=True)
    assert result.averaged == (3,) and result.dev_loss == 1


def test_patience_holds_after_an_interruption(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = recipe(speech, **PLAIN, train__epochs=9, train__patience=1, train__batch_frames=4000)
    held_out(monkeypatch, (1, 0.4), (2, 0.5), (3, 0.1))
    with monkeypatch.context() as patch:
        fails_at(weight_loop, "write_checkpoint", 3, patch)  # the model, after epochs 1 and 2
        with pytest.raises(CrashError):
            train(options, tmp_path, quiet=True)
    assert len(train(options, tmp_path, quiet=True).epochs) == 2


def test_semi_orthogonal_factors(speech: Path, tmp_path: Path) -> None:
    options = PLAIN | {"model__ffn_rank": 6, "train__semi_orthogonal": "SLLS", "train__semi_orthogonal_every": 1}
    train(recipe(speech, **options, train__epochs=6, train__average=1), tmp_path, quiet=True)
    encoder = load_model(tmp_path).encoder
    assert all(orthogonality_error(factor.detach()) < 0.1 for factor in constrained_factors(encoder, "SLLS"))
    assert all(orthogonality_error(factor.detach()) > 0.2 for factor in constrained_factors(encoder, "LSSL"))


def test_semi_orthogonal_steps_are_taken_at_the_updates_that_the_recipe_says(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.Size] = []
    monkeypatch.setattr(weight_loop, "semi_orthogonal_step", lambda factor: taken.append(factor.shape))
    options = {"model__ffn_rank": 6, "train__semi_orthogonal": "SLLL", "train__semi_orthogonal_every": 4}
    train(recipe(speech, **options), tmp_path, quiet=True)
    assert taken == [(6, 16)] * 2 * (len(updates(tmp_path)) // 4)


def test_a_model_without_decoder_is_trained_on_the_ctc_alone(speech: Path, tmp_path: Path) -> None:
    options = recipe(speech, model__decoder_layers=0, train__ctc_weight=1.0)
    result = train(options, tmp_path, quiet=True)
    assert all(line["loss"] == line["ctc"] and "attention" not in line for line in updates(tmp_path))
    assert load_model(tmp_path).decoder is None and result.dev_loss > 0
