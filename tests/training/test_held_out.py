"""Figures on held-out data against utterances one by one."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_training import TEXTS, recipe, write_speech

from mpq.models.heads import Targets
from mpq.runtime import Processes
from mpq.scoring.metrics import measure
from mpq.sensitivity.divergence import output_divergence
from mpq.speech.audio import read_audio
from mpq.speech.text import train_tokenizer
from mpq.training.building import build_model
from mpq.training.data import read_set
from mpq.training.held_out import changed_errors, held_out_errors
from mpq.training.losses import JointLoss

DECODERS = {"hybrid": {}, "ctc": {"model__decoder_layers": 0, "train__ctc_weight": 1.0}}


@pytest.mark.parametrize("kind", DECODERS)
def test_loss_divergence_and_word_errors_are_those_of_utterances_alone(kind: str, tmp_path: Path) -> None:
    write_speech(tmp_path)
    options = recipe(tmp_path, data__dev=None, train__select="last", **DECODERS[kind])
    torch.manual_seed(1)
    model = build_model(options, train_tokenizer("words", TEXTS))
    assert len(model.heads) == (1 if kind == "ctc" else 2)
    data = read_set(options.data.train, options.data, model, 1.0, is_training=True)
    with torch.no_grad():
        model.ctc.weight.mul_(20.0)  # so that it hears more words than there are
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.05)
        changed.ctc.bias[torch.arange(len(changed.ctc.bias)) != changed.blank_id] -= 9.0  # it hears nothing
    weight, sums, alone, spoken = 0.3, {"ctc": 0.0, "attention": 0.0}, [], {"model": [], "changed": []}
    with torch.no_grad():
        for index, text in enumerate(TEXTS):
            waveform = read_audio(tmp_path / f"train-{index}.wav", 8000)[None]
            length = torch.tensor([waveform.shape[1]])
            features, frames = model.features(waveform, length)
            features = features[:, : int(frames)]
            alone.append((features, frames))
            for head, loss in JointLoss(model, 0.1)(
                features, frames, Targets.of([model.tokenizer.encode(text)])
            ).items():
                sums[head] += float(loss)
            spoken["model"] += model.transcribe(waveform, length)
            spoken["changed"] += changed.transcribe(waveform, length)
    tokens = sum(len(text.split()) for text in TEXTS)
    expected = sums["ctc"] / tokens
    if kind == "hybrid":
        expected = weight * expected + (1 - weight) * sums["attention"] / (tokens + len(TEXTS))
    names = [str(index) for index in range(len(TEXTS))]
    wers = {name: measure(names, list(TEXTS), texts, [1.0] * len(TEXTS)).wer for name, texts in spoken.items()}
    assert wers["changed"] == 1.0 < wers["model"]
    found = held_out_errors(JointLoss(model, 0.1), data, weight, "error", Processes())
    assert found == pytest.approx((expected, wers["model"]), rel=1e-5)
    divergence, wer = changed_errors(model, changed, data, "error", Processes())
    assert divergence == pytest.approx(output_divergence(model, changed, alone), rel=1e-4) and divergence > 0
    assert wer == pytest.approx(wers["changed"])
