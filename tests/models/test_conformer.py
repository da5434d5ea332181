"""The encoder."""

import pytest
import torch
from tiny_models import tiny_model

from mpq.models.base import AsrModel
from mpq.speech.audio import pad_batch


def outputs(model: AsrModel, waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        features, feature_lengths = model.features(*pad_batch(waveforms))
        encoded, encoded_lengths = model.encode(features, feature_lengths)
        return features, feature_lengths, encoded, encoded_lengths, model.ctc_log_probs(encoded)


VARIANTS = [
    {},
    {"subsampling": "striding", "subsampling_channels": 16},
    {"subsampling_factor": 8},
    {"subsampling_factor": 2},
    {"conv_norm": "layer_norm"},
    {"use_bias": False},
    {"scale_input": False},
    {"attention_mask": "key"},
    {"kernel_size": 31, "layers": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_alone_equals_padded_in_a_batch(options: dict) -> None:
    model = tiny_model(**options)
    generator = torch.Generator().manual_seed(1)
    waveforms = [0.1 * torch.randn(size, generator=generator) for size in (16000, 9000, 400, 5037)]
    *_, lengths, batch = outputs(model, waveforms)
    for i, waveform in enumerate(waveforms):
        *_, length, alone = outputs(model, [waveform])
        assert int(length[0]) == int(lengths[i])
        difference = (alone[0, : int(length[0])] - batch[i, : int(length[0])]).abs().max()
        assert float(difference) <= 2e-5
        assert model.transcribe(*pad_batch([waveform])) == [model.transcribe(*pad_batch(waveforms))[i]]
