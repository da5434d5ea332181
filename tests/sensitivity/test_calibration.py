"""Which audio is drawn, and that it is found again."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import tiny_model

from mpq.errors import MpqError
from mpq.sensitivity.calibration import _cut, draw, further, in_batches, one_by_one, redraw


def test_drawn_audio_is_disjoint_bounded_and_the_same_again(tiny_manifest: Path) -> None:
    model = tiny_model()
    everything = draw(model, tiny_manifest, None)
    assert len(everything.utterances) == 6 and not everything.rest and not everything.rest_durations
    first = draw(model, tiny_manifest, 2.0, seed=5)
    second = further(model, first, 1.6)
    third = further(model, second, None)
    for data, most in ((first, 2.0), (second, 1.6)):
        assert 0 < sum(data.durations) <= most and data.max_seconds == most
        assert [w.shape[1] / 16000 for w, _ in data.waveforms] == pytest.approx(data.durations)
    names = [item.utt_id for data in (first, second, third) for item in data.utterances]
    assert sorted(names) == [item.utt_id for item in everything.utterances]
    assert not third.rest and sum(first.durations) + sum(first.rest_durations) == pytest.approx(4.8)
    assert draw(model, tiny_manifest, 2.0, seed=5).sha256 == first.sha256
    assert further(model, first, 1.6).sha256 == second.sha256 != first.sha256
    others = {tuple(item.utt_id for item in draw(model, tiny_manifest, 2.0, seed=seed).utterances) for seed in range(9)}
    assert len(others) > 2
    nothing = further(model, third, 1.0)
    assert nothing.utterances == () and nothing.waveforms == () and nothing.sha256 == hashlib.sha256().hexdigest()


def test_the_fingerprint_is_that_of_the_samples(tiny_manifest: Path) -> None:
    model = tiny_model()
    data = draw(model, tiny_manifest, 2.0)
    digest = hashlib.sha256()
    for item in data.utterances:
        samples, _ = soundfile.read(item.audio_path, dtype="float32")
        digest.update(len(samples).to_bytes(8, "little"))
        digest.update(samples.tobytes())
    assert digest.hexdigest() == data.sha256


def test_the_same_audio_is_found_again_and_other_audio_is_refused(tmp_path: Path, tiny_manifest: Path) -> None:
    model = tiny_model()
    folder = shutil.copytree(tiny_manifest.parent, tmp_path / "moved")
    data = draw(model, tiny_manifest, 2.0, seed=3)
    said = json.loads(json.dumps(data.to_json()))
    assert redraw(model, said).sha256 == data.sha256
    assert redraw(model, said).rest == data.rest
    moved = folder / tiny_manifest.name
    assert redraw(model, said, moved).sha256 == data.sha256
    samples, _ = soundfile.read(folder / data.utterances[-1].audio_path.name, dtype="int16")
    samples[100] += 1
    soundfile.write(folder / data.utterances[-1].audio_path.name, samples, 16000)
    assert draw(model, moved, 2.0, seed=3).sha256 != data.sha256
    with pytest.raises(MpqError, match=r"moved/data\.jsonl: not the audio .*with --data, or measure again"):
        redraw(model, said, moved)
    del said["seed"]
    with pytest.raises(MpqError, match=r"do not say which audio they were measured on .*no 'seed'"):
        redraw(model, said)


def test_batches_hold_each_utterance_once(tiny_manifest: Path) -> None:
    model = tiny_model()
    data = draw(model, tiny_manifest, None)
    alone = {int(lengths): features[0, : int(lengths)] for features, lengths in one_by_one(model, data)}
    batches = in_batches(model, data, 2.3)
    assert sorted(int(length) for _, lengths in batches for length in lengths) == sorted(alone)
    assert 1 < len(batches) < 6
    for features, lengths in batches:
        assert len(features) == 1 or len(features) * float(lengths.max()) / 100 <= 2.3
        for row, length in zip(features, lengths.tolist(), strict=True):
            torch.testing.assert_close(row[:length], alone[length], rtol=1e-4, atol=1e-5)


def test_varied_audio_is_the_same_audio_in_pieces(many_tones: Path) -> None:
    model = tiny_model()
    plain, data = draw(model, many_tones, None), draw(model, many_tones, None, is_varied=True)
    assert data.is_varied and not plain.is_varied and data.sha256 != plain.sha256
    assert data.sha256 == draw(model, many_tones, None, is_varied=True).sha256 and data.rest == plain.rest
    assert redraw(model, json.loads(json.dumps(data.to_json()))).sha256 == data.sha256
    assert sum(data.durations) == pytest.approx(sum(plain.durations))
    names = [utterance.utt_id for utterance in data.utterances]
    assert len(set(names)) == len(names)
    kinds = set()
    for utterance, (samples, _) in zip(plain.utterances, plain.waveforms, strict=True):
        found = [
            piece[0]
            for name, (piece, _) in zip(names, data.waveforms, strict=True)
            if name.split("#")[0] == utterance.utt_id
        ]
        together = torch.cat(found)
        if torch.equal(together, samples[0]):
            kinds.add("cut" if "#" in next(n for n in names if n.split("#")[0] == utterance.utt_id) else "whole")
            continue
        kinds.add("half the bandwidth")
        power = np.abs(np.fft.rfft(together.numpy())) ** 2
        assert len(together) == len(samples[0]) and power[len(power) * 6 // 10 :].sum() < 1e-3 * power.sum()
        lower = np.abs(np.fft.rfft(samples[0].numpy()))[: len(power) * 4 // 10]
        assert np.corrcoef(lower, np.sqrt(power[: len(lower)]))[0, 1] > 0.99
    assert kinds == {"whole", "cut", "half the bandwidth"}


def test_pieces_last_one_to_four_seconds() -> None:
    pieces = _cut(torch.arange(160_000.0), np.random.default_rng(1), 16_000)
    assert torch.equal(torch.cat(pieces), torch.arange(160_000.0))
    assert all(16_000 <= len(piece) < 48_000 for piece in pieces[:-1]) and 16_000 <= len(pieces[-1]) < 64_000
    assert [len(piece) for piece in _cut(torch.zeros(10), np.random.default_rng(1), 16_000)] == [10]
