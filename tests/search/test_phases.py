"""The three phases of a search: which weights each trains and judges, and what stops it."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_search import (
    from_checkpoint,
    refusal,
    run,
    search_recipe,
    speech,
    write_search,
)
from tiny_training import log_of

from mpq.loading import load_model
from mpq.search.loop import ArchitectureSearch
from mpq.training import objectives
from mpq.training.losses import JointLoss
from mpq.training.orthogonal import constrained_factors, orthogonality_error
from mpq.training.weights import WeightTrainer

__all__ = ["speech"]  # a fixture


def test_the_supernet_is_trained_in_paths_and_scored_as_a_whole(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[Any, ...]] = []
    scored: list[tuple[Any, ...]] = []

    def path(loss: JointLoss) -> tuple[Any, ...]:
        block = loss.model.encoder.layers[0]
        return tuple(getattr(one, "_width", "plain") for one in (block.feed_forward1, block.feed_forward2))

    forward, held_out = JointLoss.forward, objectives.held_out_errors

    def training(self: JointLoss, *arguments: Any) -> Any:
        if self.model.training:
            trained.append(path(self))
        return forward(self, *arguments)

    def scoring(loss: JointLoss, *arguments: Any) -> Any:
        scored.append(path(loss))
        return held_out(loss, *arguments)

    monkeypatch.setattr(JointLoss, "forward", training)
    monkeypatch.setattr(objectives, "held_out_errors", scoring)
    result = run(search_recipe(speech, train__accumulate=2, search__supernet_epochs=4), tmp_path)
    updates = [line for line in log_of(tmp_path / "supernet") if "rate" in line]
    paths = [one for one in trained if one != ("plain", "plain")]
    assert trained[: len(paths)] == paths and len(trained) > len(paths)  # the last phase has no paths
    assert set(itertools.chain(*paths)) == {4, 12, 32} and len(set(paths)) >= 4
    assert len(updates) < len(paths) <= 2 * len(updates)
    assert len(list(itertools.groupby(paths))) <= len(updates)  # one path for both batches of an update
    chosen = tuple(width for width, _ in result.architecture.shapes()[0])
    whole, plain = [(None, None)], [("plain", "plain")]
    assert scored == whole * (4 + 2) + whole + [chosen] + plain * (2 + 2)  # epochs, their average, the best of them


def test_factors_are_kept_semi_orthogonal_in_both_trainings(speech: Path, tmp_path: Path) -> None:
    options = {
        "search__space": "ranks", "search__ffn_width": None, "search__ffn_rank": [3, 6, 12], "train__batch_frames": 200,
        "train__semi_orthogonal_every": 1, "train__average": 1, "train__select": "last",
        "search__supernet_epochs": 3, "search__final_epochs": 3, "search__epochs": 1,
    }  # fmt: skip
    for placing in ("SLLS", "LLLL"):
        run(search_recipe(speech, **options, train__semi_orthogonal=placing), tmp_path / placing)
        for folder in ("supernet", "."):
            encoder = load_model(tmp_path / placing / folder).encoder
            factors = constrained_factors(encoder, "SLLS")
            assert len(factors) == 4
            errors = [orthogonality_error(one.detach()) for one in factors]
            assert max(errors) < 0.1 if placing == "SLLS" else min(errors) > 0.1, (folder, errors)


@pytest.mark.parametrize("loss", ["transcripts", "distillation"])
def test_every_phase_has_the_loss_that_was_asked_for(loss: str, speech: Path, tmp_path: Path) -> None:
    result = run(from_checkpoint(speech, speech / "hybrid", search__loss=loss, search__ffn_width=None), tmp_path)
    logged = {"transcripts": {"ctc", "attention"}, "distillation": {"ctc_kl", "attention_kl", "hidden"}}
    for folder in ("supernet", "architecture", "."):
        lines = [line for line in log_of(tmp_path / folder) if "rate" in line]
        rest = set(lines[0]) - {"step", "epoch", "loss", "norm", "rate", "millions"}
        assert rest == logged[loss], folder
    found = result.architecture  # of the teacher: the divergence from itself, but for what rounding does
    assert loss == "transcripts" or 0 <= found.largest_loss < found.loss


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_loss_that_is_not_finite_is_told(
    phase: int, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_search(speech / "nan.toml", train__workers=0)
    owner = ArchitectureSearch if phase == 2 else WeightTrainer
    folder = {1: tmp_path / "supernet", 2: tmp_path / "architecture", 3: tmp_path}[phase]
    losses = owner.losses

    def spoilt(self: Any, batch: Any, index: int) -> Any:
        loss, values, each = losses(self, batch, index)
        is_bad = self.out == folder and self.step == 1
        return (loss * float("nan"), values, each * float("nan")) if is_bad else (loss, values, each)

    monkeypatch.setattr(owner, "losses", spoilt)
    line = refusal(path, "--out", tmp_path)
    assert "the loss or its gradient is not finite; utterances" in line
    assert ("dev-" if phase == 2 else "train-") in line
