"""The layer where a model breaks down is the one that was spoilt."""

import json
from pathlib import Path

import pytest
import torch
from tiny_hybrids import hybrid
from tiny_models import tiny_model

from mpq.errors import MpqError
from mpq.finetuning.overflow import overflow, overflow_on
from mpq.models.base import AsrModel
from mpq.speech.manifests import read_data

MODELS = {"nemo": tiny_model, "hybrid": hybrid}


def features(model: AsrModel) -> tuple[torch.Tensor, torch.Tensor]:
    waveforms = 0.1 * torch.randn(2, 12000, generator=torch.Generator().manual_seed(1))
    return model.features(waveforms, torch.tensor([12000, 7000]))


def spoil(model: AsrModel, layer: str) -> None:
    """Makes one number of the first weight of a layer infinite."""
    with torch.no_grad():
        next(one for name, one in model.named_parameters() if name.startswith(layer)).view(-1)[0] = float("inf")


@pytest.mark.parametrize("name", MODELS)
def test_the_first_layer_that_was_spoilt_is_named(name: str) -> None:
    layers = [segment.prefixes[0] for segment in MODELS[name]().eval().segments if segment.prefixes]
    assert len(layers) > 4
    for first, second in zip(layers, [*layers[1:], None], strict=True):
        model = MODELS[name]().eval()
        spoil(model, first)
        if second is not None:
            spoil(model, second)
        assert overflow(model, *features(model)) == f" (from the layer {first.rstrip('.')} on)"


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_model_has_none(name: str) -> None:
    model = MODELS[name]().eval()
    assert overflow(model, *features(model)) == ""


def test_utterances_are_read_until_one_of_them_shows_it(tiny_manifest: Path, tmp_path: Path) -> None:
    """The second file is not there, which only the search in a sound model finds out."""
    first = tiny_manifest.parent / json.loads(tiny_manifest.read_text().splitlines()[0])["audio_filepath"]
    lines = [{"audio_filepath": str(path), "duration": 1.0} for path in (first, tmp_path / "gone.wav")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items, model = read_data(tmp_path / "data.jsonl"), tiny_model().eval()
    assert overflow_on(items[:1], model, "error") == "" == overflow_on([], model, "error")
    with pytest.raises(MpqError, match=r"gone\.wav"):
        overflow_on(items, model, "error")
    layer = model.segments[0].prefixes[0]
    spoil(model, layer)
    assert overflow_on(items, model, "error") == f" (from the layer {layer.rstrip('.')} on)"
