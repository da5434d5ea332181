"""Batches of an epoch as properties; which utterances are left out, and what is said of the others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_hybrid
from tiny_training import RATE, TEXTS, recipe, write_recipe, write_speech

from mpq.config import AugmentConfig, DataConfig
from mpq.errors import MpqError
from mpq.models.hybrid import HybridConformer
from mpq.pipeline.read import load_recipe
from mpq.speech.audio import read_audio
from mpq.speech.augment import generator
from mpq.speech.text import train_tokenizer
from mpq.training import data as data_module
from mpq.training.building import build_model
from mpq.training.data import BatchReader, TrainingSet, plan_epoch, read_set, read_transcripts
from mpq.training.run import train

# ---- which utterances form which batch

SECONDS = st.lists(st.integers(1, 300).map(lambda frames: frames * 0.01), min_size=1, max_size=40)


@given(SECONDS, st.integers(50, 2000), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
def test_plans(durations: list[float], batch_frames: int, seed: int, epoch: int, least: int) -> None:
    if len(durations) < least:
        with pytest.raises(MpqError, match=f"for each of {least} processes, got {len(durations)}"):
            plan_epoch(durations, 0.01, batch_frames, seed, epoch, least)
        return
    plan = plan_epoch(durations, 0.01, batch_frames, seed, epoch, least)
    assert sorted(index for batch in plan for index in batch) == list(range(len(durations)))
    assert all(len(batch) >= least for batch in plan)
    over = [batch for batch in plan if len(batch) * max(round(100 * durations[i]) for i in batch) > batch_frames]
    over = [batch for batch in over if len(batch) > least]
    assert len(over) <= (least > 1) and all(len(batch) < 2 * least or least > 1 for batch in over)
    assert plan == plan_epoch(durations, 0.01, batch_frames, seed, epoch, least)


def test_batches_are_full_alike_and_different_in_every_epoch() -> None:
    durations = np.random.default_rng(0).uniform(0.5, 10, 400).tolist()
    plans = [plan_epoch(durations, 0.01, 8000, 0, epoch) for epoch in range(3)]
    for plan in plans:
        longest = [max(durations[index] for index in batch) for batch in plan]
        padded = sum(one * len(batch) for one, batch in zip(longest, plan, strict=True))
        assert padded < 1.15 * sum(durations)  # little padding
        assert len(plan) < 1.25 * sum(durations) * 100 / 8000  # full batches
        assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.6  # in random order
    together = [{frozenset(batch) for batch in plan} for plan in plans]
    assert not together[0] & together[1] and plans[0] != plan_epoch(durations, 0.01, 8000, 1, 0)


def test_an_utterance_longer_than_a_batch_is_one() -> None:
    plan = plan_epoch([1.0, 30.0, 1.0], 0.01, 250, 0, 0)
    assert sorted(map(sorted, plan)) == [[0, 2], [1]]


# ---- which utterances


def described(folder: Path, **changes: Any) -> tuple[DataConfig, HybridConformer]:
    options = recipe(folder, **({"data__dev": None, "train__select": "last"} | changes))
    tokenizer = train_tokenizer("characters", read_transcripts(options.data))
    return options.data, build_model(options, tokenizer)


def test_a_set(tmp_path: Path) -> None:
    write_speech(tmp_path)
    config, model = described(tmp_path)
    found = read_set(config.train, config, model, 1.1, is_training=True)
    assert [item.text for item in found.utterances] == list(TEXTS)
    assert found.durations == pytest.approx([0.2 * len(text) for text in TEXTS])
    assert found.tokens == tuple(model.tokenizer.encode(text) for text in TEXTS)
    assert (found.skipped, found.too_long) == (0, 0)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_text_too_long_for_the_ctc(skip_bad: bool, tmp_path: Path) -> None:
    """0.4 s are 40 frames, 10 for the encoder (9 at the highest speed): room for 8 letters, not for 5 twice the same.

    deed deed has 9 letters, a space among them, and two pairs: 11 frames.
    """
    write_speech(tmp_path, ["ab", "cab", "de"])
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lines[0]["text"] = "deed deed"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, model = described(tmp_path, data__skip_bad=skip_bad)
    if skip_bad:
        found = read_set(config.train, config, model, 1.0, is_training=True)
        assert [item.utt_id for item in found.utterances] == ["train-1", "train-2"] and found.skipped == 1
        return
    with pytest.raises(MpqError) as error:
        read_set(config.train, config, model, 1.0, is_training=True)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        f'{tmp_path / "train.jsonl"}:1: "train-0": too long a text for its 0.40 s (at the highest speed): the CTC '
        "needs 11 frames for 9 tokens, the audio has 10; mend the text or the audio"
    )
    assert lines[1].startswith("1 of 3 utterances cannot be used") and len(lines) == 2
    assert "--skip-bad" not in lines[1]  # mpq train has no such option


@pytest.mark.parametrize(("text", "is_possible"), [("abcdeabcda", True), ("aabcdeabcd", False), ("abcdeabcdab", False)])
def test_the_room_is_that_of_the_encoder(text: str, is_possible: bool, tmp_path: Path) -> None:
    """10 encoder frames: 10 tokens fit, 11 do not, nor 10 with a blank between two that are equal."""
    write_speech(tmp_path, ["ab", "cde"])
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lines[0]["text"] = text
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, model = described(tmp_path)
    if is_possible:
        assert len(read_set(config.train, config, model, 1.0, is_training=True).utterances) == 2
    for fastest in (1.0,) if not is_possible else (1.1,):
        with pytest.raises(MpqError, match='"train-0": too long a text'):
            read_set(config.train, config, model, fastest, is_training=True)


def test_what_passes_has_a_finite_loss_at_every_speed(tmp_path: Path) -> None:
    """The check must hold for the frames that changed speed really gives; here with no frame to spare."""
    from mpq.models.heads import Targets
    from mpq.speech.augment import changed_speed
    from mpq.training.losses import JointLoss

    write_speech(tmp_path, ["ab", "cde"])
    _, model = described(tmp_path)
    letters = "abcde" * 5
    for samples in range(3000, 3120, 7):
        waveform = torch.from_numpy(np.random.default_rng(0).normal(size=samples)).float()
        for speed in (0.9, 1.0, 1.1):
            changed = changed_speed(waveform, speed, RATE)[None]
            features, lengths = model.features(changed, torch.tensor([changed.shape[1]]))
            frames = int(model.encoded_lengths(lengths))
            seconds = samples / RATE
            allowed = int(model.encoded_lengths(model.feature_lengths(torch.tensor([int(seconds / speed * RATE) - 1]))))
            assert allowed in (frames, frames - 1)
            with torch.no_grad():
                tokens = model.tokenizer.encode(letters[:allowed])
                ctc = JointLoss(model, 0.0)(features, lengths, Targets.of([tokens]))["ctc"]
            assert ctc.isfinite().all()


def test_long_utterances_are_left_out_of_training_and_counted(tmp_path: Path) -> None:
    write_speech(tmp_path)
    config, model = described(tmp_path, data__max_seconds=1.1)
    found = read_set(config.train, config, model, 1.0, is_training=True)
    assert (len(found.utterances), found.too_long, found.skipped) == (9, 1, 0)  # "bed cab" has 1.4 s
    assert "bed cab" not in [item.text for item in found.utterances]
    assert len(read_set(config.train, config, model, 1.0, is_training=False).utterances) == 10
    config, model = described(tmp_path, data__max_seconds=0.1)
    with pytest.raises(MpqError, match="max_seconds"):
        read_set(config.train, config, model, 1.0, is_training=True)


def test_faulty_utterances(tmp_path: Path) -> None:
    """No text, no audio, too short for the highest speed, letters that no training text has (dev)."""
    write_speech(tmp_path, ["abc", "ace", "bad", "deed"])
    write_speech(tmp_path, ["abed", "fog"], "dev.jsonl")
    write_speech(tmp_path, ["a"], "short.jsonl", seconds=0.01)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[1] = '{"audio_filepath": "train-1.wav"}'
    lines[2] = '{"audio_filepath": "gone.wav", "text": "bad"}'
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    strict = recipe(tmp_path)
    with pytest.raises(MpqError, match=r'train\.jsonl:2: "train-1" has no text; give one'):
        read_transcripts(strict.data)
    config, model = described(tmp_path, data__skip_bad=True)
    assert read_transcripts(config) == ["abc", "bad", "deed"]
    found = read_set(config.train, config, model, 1.0, is_training=True)
    assert [item.text for item in found.utterances] == ["abc", "deed"] and found.skipped == 2
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"audio_filepath": "train-3.wav", "text": 5}\n{\n')
    assert read_transcripts(config) == ["abc", "bad", "deed"]
    assert read_set(config.train, config, model, 1.0, is_training=True).skipped == 4
    with pytest.raises(MpqError, match="4 of 6 utterances cannot be used"):
        read_set(config.train, strict.data, model, 1.0, is_training=True)
    with pytest.raises(MpqError, match="'f'"):
        read_set(["dev.jsonl"], strict.data, model, 1.0, is_training=False)
    length = 0.05  # seconds of short-0: 400 samples of its letter and the pause after it
    assert model.min_samples <= length * RATE < 2 * model.min_samples
    with pytest.raises(MpqError, match=r"short-0\.wav: too short"):
        read_set(["short.jsonl"], strict.data, model, 2.0, is_training=True)


def test_several_manifests_are_one_set(tmp_path: Path) -> None:
    write_speech(tmp_path)
    write_speech(tmp_path, ["fee", "fad"], "more.jsonl")
    config, model = described(tmp_path, data__train=["train.jsonl", "more.jsonl"])
    assert "f" in model.tokenizer.pieces
    found = read_set(config.train, config, model, 1.0, is_training=True)
    assert [item.utt_id for item in found.utterances][-2:] == ["more-0", "more-1"]


# ---- reading


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_read(workers: int, tmp_path: Path) -> None:
    write_speech(tmp_path)
    config, model = described(tmp_path)
    data = read_set(config.train, config, model, 1.1, is_training=True)
    plan = [[3, 1], [9], [0, 2, 4]]
    plain = BatchReader(data, AugmentConfig(), model, "error", 0, workers)
    for batch, (waveforms, lengths, targets) in zip(plan, plain.read(0, plan), strict=True):
        assert lengths.tolist() == [round(data.durations[index] * RATE) for index in batch]
        assert waveforms.shape == (len(batch), int(lengths.max()))
        for row, index in enumerate(batch):
            expected = read_audio(data.utterances[index].audio_path, RATE)
            assert torch.equal(waveforms[row, : int(lengths[row])], expected)
            assert not waveforms[row, int(lengths[row]) :].any()
            assert targets.tokens[row, : int(targets.lengths[row])].tolist() == data.tokens[index]
    changed = AugmentConfig(speed=[0.9, 1.1], noise=["white"], noise_probability=1.0)
    reader = BatchReader(data, changed, model, "error", 0, workers)
    both = [list(reader.read(epoch, [[3, 1], [1, 9]])) for epoch in (0, 0, 1)]
    assert torch.equal(both[0][0][0], both[1][0][0])
    one = both[0][0][0][1, : int(both[0][0][1][1])]
    assert torch.equal(one, both[0][1][0][0, : int(both[0][1][1][0])])  # whatever the batch
    again = both[2][0][0][1, : int(both[2][0][1][1])]
    assert len(again) != len(one) or not torch.equal(again, one)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plan_that_is_given_up_leaves_nothing_to_the_next(workers: int, tmp_path: Path) -> None:
    write_speech(tmp_path)
    config, model = described(tmp_path)
    data = read_set(config.train, config, model, 1.1, is_training=True)
    reader = BatchReader(data, AugmentConfig(noise=["babble"]), model, "error", 0, workers)
    next(reader.read(0, [[0], [1], [2], [3]]))
    found = [lengths.tolist() for _, lengths, _ in reader.read(1, [[4], [5, 6]])]
    assert found == [[round(data.durations[index] * RATE) for index in batch] for batch in ([4], [5, 6])]


def test_noise_that_is_not_there(tmp_path: Path) -> None:
    write_speech(tmp_path)
    path = write_recipe(
        tmp_path / "recipe.toml", data__dev=None, train__select="last", augment__noise=["white", "music"]
    )
    with pytest.raises(MpqError, match=r"\[augment\] noise.*music.*no such file or folder"):
        load_recipe(path, stages=["train"])
    (tmp_path / "music").mkdir()
    with pytest.raises(MpqError, match=r"noise: .*music: no recording"):
        train(load_recipe(path, stages=["train"]), tmp_path / "out", quiet=True)
    assert generator(0, 0, "", "").integers(2) in (0, 1)


def test_there_is_a_reader_for_each_core_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(data_module, "DataLoader", lambda *_, num_workers, **options: asked.append(num_workers))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for workers in (0, 1, 100_000):
        BatchReader(TrainingSet((), (), ()), AugmentConfig(), tiny_hybrid(), "error", 0, workers)
    assert asked == [0, 1, 2]
