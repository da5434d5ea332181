"""What a search begins with: a model whose units are in order, and its candidates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_search import from_checkpoint, search_recipe, speech
from torch import Tensor

from mpq.errors import MpqError
from mpq.files import sha256_file
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.search.importance import unit_importance
from mpq.search.start import Start, largest_model, search_start
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.statistics import input_grams

__all__ = ["speech"]  # a fixture

CPU = torch.device("cpu")


def outputs(model: AsrModel) -> Tensor:
    waveforms = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded, _ = model.encode(*model.features(waveforms, torch.tensor([9000, 6000])))
        return model.ctc_log_probs(encoded)


def begun(speech: Path, **changes: Any) -> tuple[Start, AsrModel]:
    """Returns the start of a search from the checkpoint `hybrid`, and the model of its largest candidates."""
    recipe = from_checkpoint(speech, speech / "hybrid", **changes)
    start = search_start(recipe, CPU)
    return start, largest_model(recipe, start).eval()


def test_a_trained_models_units_are_in_order_at_the_start(speech: Path) -> None:
    start, largest = begun(speech, search__ffn_width=None)
    model, file = load_model(speech / "hybrid"), speech / "hybrid/model.safetensors"
    assert start.checkpoint == {"path": str(file), "sha256": sha256_file(file)}
    assert start.space[0][0].widths == tuple(range(8, 33))
    torch.testing.assert_close(outputs(largest), outputs(model), atol=1e-4, rtol=1e-4)
    first, own = (one.encoder.layers[0].feed_forward1.linear1.weight for one in (largest, model))
    assert not torch.equal(first, own)
    audio = draw(model, speech / "train.jsonl", 60.0, 0, "error")
    for scores in unit_importance(largest, input_grams(largest, one_by_one(largest, audio)))[0]:
        assert scores.tolist() == list(range(31, -1, -1))


def test_a_trained_model_in_factors(speech: Path) -> None:
    _, both = begun(speech, search__space="both", search__ffn_width=[8, 24], search__ffn_rank=[2, 16])
    assert both.encoder.options.ffn_shapes() == [((24, 16), (24, 16))]
    _, ranks = begun(speech, search__space="ranks", search__ffn_width=None, search__ffn_rank=[2, 16])
    assert ranks.encoder.options.ffn_shapes() == [((32, 16), (32, 16))]
    torch.testing.assert_close(outputs(ranks), outputs(load_model(speech / "hybrid")), atol=2e-2, rtol=1e-2)


def test_from_scratch_the_model_is_as_large_as_its_candidates(speech: Path) -> None:
    """They may be larger than what the recipe's model has; the weights are those of the seed."""
    recipes = [search_recipe(speech, search__ffn_width=[8, 48], search__ffn2_width=[4, 12], seed=s) for s in (0, 0, 1)]
    starts = [search_start(recipe, CPU) for recipe in recipes]
    for recipe, start in zip(recipes, starts, strict=True):
        assert start.checkpoint is None and largest_model(recipe, start) is start.model
        assert start.largest == start.model.encoder.options.ffn_shapes() == [((48, 0), (12, 0))]
    weights = [start.model.ctc.weight for start in starts]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("loss", "is_imitating"), [(None, False), ("transcripts", False), ("distillation", True)])
def test_a_model_of_mpq_is_trained_on_transcripts_unless_it_is_to_be_imitated(
    loss: str | None, is_imitating: bool, speech: Path
) -> None:
    assert search_start(from_checkpoint(speech, speech / "hybrid", search__loss=loss), CPU).is_imitating == is_imitating


def test_an_archive_is_imitated(speech: Path, tiny_archive: Path) -> None:
    changes = {"search__ffn_width": [2, 4]}
    assert search_start(from_checkpoint(speech, tiny_archive, **changes), CPU).is_imitating


@pytest.mark.parametrize(("millions", "expected"), [(None, None), (0.01, 10_000)])
def test_a_target_is_a_number_of_parameters(millions: float | None, expected: int | None, speech: Path) -> None:
    eta = 1.0 if millions is None else None
    found = search_start(search_recipe(speech, search__eta=eta, search__target_millions=millions), CPU)
    assert found.most_parameters == expected


def test_statistics_are_of_the_calibration_audio(speech: Path) -> None:
    assert search_recipe(speech).calibration() == "train.jsonl"
    assert search_recipe(speech, data__calibration="dev.jsonl").calibration() == "dev.jsonl"


def test_what_cannot_be_searched_is_refused(speech: Path) -> None:
    with pytest.raises(MpqError, match="ctc_weight: 1 would leave the decoder untrained"):
        search_start(from_checkpoint(speech, speech / "hybrid", train__ctc_weight=1.0, model__decoder_layers=0), CPU)
    with pytest.raises(MpqError, match=r"model\.safetensors: \[search\] ffn_width: expected candidates up to 32"):
        search_start(from_checkpoint(speech, speech / "hybrid", search__ffn_width=[2, 33]), CPU)
