"""Log-mel features against a plain loop and a checkpoint's own filter bank."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from mpq.loading import load_model
from mpq.models.nemo import NemoConformerCtc
from mpq.speech.features import LogMelOptions, slaney_filter_bank


def test_filter_bank_equals_the_checkpoints(shared: Path) -> None:
    model = load_model(shared / "data/stt_en_conformer_ctc_small.nemo")
    front = model.preprocessor.featurizer
    assert float((slaney_filter_bank(front.options) - front.fb[0]).abs().max()) < 1e-6 * float(front.fb.max()) * 10


@pytest.mark.parametrize("normalize", ["per_feature", "all_features", "none"])
def test_features_by_a_plain_loop(normalize: str) -> None:
    """One frame at a time in float64, from the description of NeMo's preprocessor."""
    options = LogMelOptions(16000, 8, 512, 400, 160, normalize=normalize, pad_to=16)
    model = NemoConformerCtc(tiny_model(features=8).encoder.options, options, tiny_model().tokenizer)
    wave = 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(2))
    got, lengths = model.features(wave[None], torch.tensor([3000]))
    samples = wave.double().numpy()
    emphasized = np.concatenate([samples[:1], samples[1:] - 0.97 * samples[:-1]])
    padded = np.pad(emphasized, 256)
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399), 56)
    bank = slaney_filter_bank(options).double().numpy()
    frames = []
    for t in range(3000 // 160):
        power = np.abs(np.fft.rfft(padded[t * 160 : t * 160 + 512] * window)) ** 2
        frames.append(np.log(bank @ power + 2.0**-24))
    expected = np.array(frames)
    axis = {"per_feature": 0, "all_features": None, "none": None}[normalize]
    if normalize != "none":
        deviation = expected.std(axis=axis, ddof=1, keepdims=True)
        expected = (expected - expected.mean(axis=axis, keepdims=True)) / (deviation + 1e-5)
    assert lengths.tolist() == [18] and got.shape == (1, 32, 8)
    np.testing.assert_allclose(got[0, :18].numpy(), expected, atol=2e-4)
    assert bool((got[0, 18:] == 0).all())


def test_a_single_frame_has_features() -> None:
    features, lengths = tiny_model().features(torch.ones(2, 400), torch.tensor([400, 160]))
    assert lengths.tolist() == [2, 1] and bool(features.isfinite().all()) and bool((features[1] == 0).all())
