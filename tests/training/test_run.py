"""A training from end to end: its folder, its result, and what it learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_training import (
    PLAIN,
    TEXTS,
    dropping,
    log_of,
    recipe,
    speech,
    updates,
    whole,
    write_speech,
)

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.heads import Targets
from mpq.scoring.metrics import measure
from mpq.speech.audio import read_audio
from mpq.training.losses import JointLoss
from mpq.training.record import TrainingResult
from mpq.training.run import train

__all__ = ["dropping", "speech", "whole"]  # fixtures


def test_a_checkpoint_folder_has_what_it_should(whole: Path, dropping: Recipe) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "model.safetensors",
        "recipe.json",
        "log.jsonl",
        "training.json",
    }
    assert Recipe.model_validate_json((whole / "recipe.json").read_text()) == dropping
    log = log_of(whole)
    found = updates(whole)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1)) and len(found) >= 9
    assert [line["epoch"] for line in log if "dev_wer" in line] == [1, 2, 3]
    for line in found:
        assert line["loss"] == pytest.approx(0.2 * line["ctc"] + 0.8 * line["attention"], rel=1e-12)
        assert line["rate"] == pytest.approx(0.003 * min(line["step"] / 4, (4 / line["step"]) ** 0.5))
    result = TrainingResult.load(whole / "training.json")
    for done in result.epochs:
        losses = [line["loss"] for line in found if line["epoch"] == done.epoch]
        assert done.train_loss == pytest.approx(np.mean(losses), rel=1e-12)
        assert done.step == [line["step"] for line in found if line["epoch"] == done.epoch][-1]
    model = load_model(whole)
    assert result.parameters == model.parameter_counts() and not model.training
    assert (result.utterances, result.skipped, result.too_long, result.processes) == (10, 0, 0, 1)
    assert len(result.averaged) == 2


def test_dev_loss_and_wer_are_those_of_the_model(whole: Path, speech: Path) -> None:
    """One utterance at a time."""
    model, result = load_model(whole), TrainingResult.load(whole / "training.json")
    texts, hypotheses, total = ["abed", "dace", "a bee"], [], 0.0
    with torch.no_grad():
        for index, text in enumerate(texts):
            waveform = read_audio(speech / f"dev-{index}.wav", 8000)[None]
            length = torch.tensor([waveform.shape[1]])
            ctc, attention = JointLoss(model, 0.1)(
                *model.features(waveform, length), Targets.of([model.tokenizer.encode(text)])
            ).values()
            total += 0.2 * float(ctc) / 13 + 0.8 * float(attention) / 16
            hypotheses += model.transcribe(waveform, length)
    assert result.dev_loss == pytest.approx(total, rel=1e-5)
    assert result.dev_wer == pytest.approx(measure(["0", "1", "2"], texts, hypotheses, [1.0] * 3).wer)


def test_words_and_bpe(speech: Path, tmp_path: Path) -> None:
    one = {"train__epochs": 1, "train__average": 1}
    train(recipe(speech, **one, tokens__type="bpe", tokens__vocabulary_size=9), tmp_path / "bpe", quiet=True)
    assert len(load_model(tmp_path / "bpe").tokenizer.pieces) == 9
    words = recipe(speech, **one, tokens__type="words", data__dev="train.jsonl")
    train(words, tmp_path / "words", quiet=True)
    assert load_model(tmp_path / "words").tokenizer.pieces == tuple(sorted({word for t in TEXTS for word in t.split()}))
    with pytest.raises(MpqError, match=r'dev\.jsonl:1.*"dace"|abed'):
        train(recipe(speech, **one, tokens__type="words"), tmp_path / "unknown", quiet=True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten utterances, learned by heart: a folder with train.jsonl and the checkpoint `out`."""
    folder = tmp_path_factory.mktemp("learned")
    write_speech(folder)
    options = PLAIN | {
        "data__dev": None,
        "model__width": 32,
        "model__ffn_width": 64,
        "model__subsampling_channels": 8,
        "model__decoder_ffn_width": 64,
        "train__select": "last",
        "train__average": 1,
        "train__epochs": 90,
        "train__batch_frames": 1200,
        "train__learning_rate": 0.005,
        "train__warmup_steps": 20,
        "train__schedule": "cosine",
        "train__ctc_weight": 0.3,
    }
    train(recipe(folder, **options), folder / "out", quiet=True)
    return folder


@pytest.mark.parametrize("method", ["greedy", "prefix", "joint"])
def test_ten_utterances_are_learned_by_heart(method: str, learned: Path, tmp_path: Path) -> None:
    """Whatever the decoder, and however the utterances are put into batches."""
    transcripts = []
    for seconds in (60, 2, 0.5):
        out = tmp_path / str(seconds)
        command = ["evaluate", learned / "out", "--data", learned / "train.jsonl", "--out", out, "--decode", method]
        done = CliRunner().invoke(main, [*map(str, command), "--batch-seconds", str(seconds), "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["wer"] == 0
        transcripts.append((out / "hyp.trn").read_text())
    assert transcripts == [transcripts[0]] * 3
    assert transcripts[0].splitlines() == [f"{text} (train-{index})" for index, text in enumerate(TEXTS)]


@pytest.mark.parametrize("method", ["greedy", "prefix", "joint"])
def test_transcripts_of_an_untrained_model_do_not_depend_on_the_batch(
    method: str, whole: Path, speech: Path, tmp_path: Path
) -> None:
    """A model that is sure of nothing would show the slightest influence."""
    found = []
    for seconds in (60, 3, 0.5):
        command = ["evaluate", whole, "--data", speech / "train.jsonl", "--out", tmp_path / str(seconds)]
        done = CliRunner().invoke(
            main, [*map(str, command), "--decode", method, "--batch-seconds", str(seconds), "--quiet"]
        )
        assert done.exit_code == 0, done.output
        found.append((tmp_path / str(seconds) / "hyp.trn").read_text())
    assert found == [found[0]] * 3
