"""The pitch of signals whose pitch is known, the path against brute force, the formulas against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from mpq.errors import MpqError
from mpq.speech.pitch import _best_path, _low_passed, pitch_features, pitch_track

RATE, HOP = 16000, 160


def tone(f0: float | np.ndarray, seconds: float = 1.0, harmonics: range = range(1, 2), rate: int = RATE) -> np.ndarray:
    """Harmonics of a fundamental (Hz; an array glides, a value for each sample), with amplitudes 1/k."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(f0, round(seconds * rate))) / rate
    return sum(0.1 / k * np.cos(k * phase + k * k) for k in harmonics)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def batch(*signals: np.ndarray, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The signals as a padded batch, their lengths, and how many frames LogMel would give it."""
    lengths = torch.tensor([len(signal) for signal in signals])
    waveforms = torch.zeros(len(signals), int(lengths.max()) + pad)
    for row, signal in zip(waveforms, signals, strict=True):
        row[: len(signal)] = torch.from_numpy(np.asarray(signal)).float()
    return waveforms, lengths, waveforms.shape[1] // HOP + 1


def features(*signals: np.ndarray, pad: int = 0) -> torch.Tensor:
    waveforms, lengths, frames = batch(*signals, pad=pad)
    return pitch_features(waveforms, lengths, RATE, HOP, frames)


def track(signal: np.ndarray, rate: int = RATE) -> np.ndarray:
    """f0 in Hz of the valid frames, without the two at either end."""
    hop = rate // 100
    waveforms, lengths, _ = batch(signal)
    f0 = pitch_track(waveforms, lengths, rate, hop, len(signal) // hop)[1]
    return f0[0, 2:-2].numpy()


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 4000])
@pytest.mark.parametrize("f0", [60.0, 97.3, 150.0, 223.7, 380.0])
def test_the_pitch_of_a_harmonic_complex_is_found(f0: float, rate: int) -> None:
    found = track(tone(f0, harmonics=range(1, 6), rate=rate), rate)
    assert np.abs(found / f0 - 1).max() < 0.02


@pytest.mark.parametrize("f0", [110.0, 200.0, 390.0])
def test_the_pitch_of_a_pure_tone_is_found(f0: float) -> None:
    assert np.abs(track(tone(f0)) / f0 - 1).max() < 0.01


def test_the_pitch_of_noisy_speechlike_sound_is_found() -> None:
    found = track(tone(130.0, harmonics=range(1, 12)) + 0.2 * noise(1.0))
    assert np.median(np.abs(found / 130 - 1)) < 0.01


@pytest.mark.parametrize("harmonics", [range(2, 7), range(3, 8)], ids=["from the second", "from the third"])
@pytest.mark.parametrize("f0", [90.0, 120.0, 180.0])
def test_a_missing_fundamental_is_no_octave_error(f0: float, harmonics: range) -> None:
    assert np.abs(track(tone(f0, harmonics=harmonics)) / f0 - 1).max() < 0.02


def test_a_strong_second_harmonic_and_a_weak_fundamental_are_no_octave_error() -> None:
    signal = tone(100.0, harmonics=range(1, 4)) + 0.3 * tone(200.0)
    assert np.abs(track(signal) / 100 - 1).max() < 0.02


def test_a_glide_is_followed_and_has_its_slope() -> None:
    seconds = 2.0
    glide = 100 * 2 ** (np.arange(round(seconds * RATE)) / (seconds * RATE))  # an octave up, 100 to 200 Hz
    signal = tone(glide, seconds, range(1, 6))
    found, expected = track(signal), glide[::HOP][2:-2]
    assert np.abs(found / expected - 1).max() < 0.02
    slope = 10 * math.log(2) / (seconds * 100)  # log f0 per frame, scaled
    delta = features(signal)[0, 5:-6, 2]
    assert abs(delta.mean() - slope) < 0.03 * slope
    height = features(signal)[0, :-1, 1]  # relative to the mean of 1.5 s, so flat in the middle and steep at the ends
    assert height[:20].max() < -0.1 and height[-20:].min() > 0.1 and height[80:120].abs().max() < 0.05


def test_frame_t_is_centred_on_sample_t_times_hop() -> None:
    signal = np.concatenate([tone(120.0, 0.5, range(1, 4)), tone(200.0, 0.5, range(1, 4))])
    waveforms, lengths, _ = batch(signal)
    f0 = pitch_track(waveforms, lengths, RATE, HOP, 100)[1][0]
    change = int((f0 > 155).nonzero()[0])
    assert abs(change - 50) <= 2
    assert (f0[: change - 2] < 130).all() and (f0[change + 2 :] > 190).all()


def test_noise_is_less_voiced_than_a_vowel() -> None:
    vowel, hiss = features(tone(140.0, harmonics=range(1, 15)), noise(1.0))[:, 3:-4, 0]
    assert vowel.max() < -1.0 < hiss.min() - 0.3  # the warped NCCF falls with voicing
    assert abs(features(tone(100.0))[0, 20, 0] - 2 * (0.0001**0.15 - 1)) < 0.1  # c = 1


def test_silence_is_finite_and_unvoiced() -> None:
    silence = features(np.zeros(RATE), np.full(RATE, 0.25))
    assert torch.isfinite(silence).all()
    assert silence[0, :, 0].abs().max() < 1e-4 and silence[0, :, 1:].abs().max() < 1e-5
    partly = features(np.concatenate([np.zeros(RATE), tone(150.0, 0.5), np.zeros(RATE)]))
    assert torch.isfinite(partly).all()


def test_padding_and_company_change_nothing() -> None:
    signals = [tone(123.0, 0.7, range(1, 6)), noise(1.3), tone(222.0, 0.333), np.zeros(5000), noise(0.05, 1)]
    together = features(*signals, pad=4321)
    for row, signal in zip(together, signals, strict=True):
        alone, valid = features(signal)[0], len(signal) // HOP
        torch.testing.assert_close(row[:valid], alone[:valid], atol=1e-5, rtol=0)
        assert not row[valid:].any() and not alone[valid:].any()


def test_what_lies_in_the_padding_is_not_looked_at() -> None:
    waveforms, lengths, frames = batch(tone(123.0, 0.7), noise(0.4))
    dirty = waveforms.clone()
    dirty[1, lengths[1] :] = 1.0
    assert torch.equal(*(pitch_features(x, lengths, RATE, HOP, frames) for x in (waveforms, dirty)))


def test_the_same_each_time_and_at_every_level() -> None:
    signal = tone(170.0, 0.6, range(1, 5)) + 0.3 * noise(0.6)
    expected = features(signal)
    assert torch.equal(features(signal), expected)
    for gain in (0.1, 1e-3, 8.0):
        torch.testing.assert_close(features(gain * signal), expected, atol=1e-4, rtol=0)


def test_an_offset_does_not_hide_the_pitch() -> None:
    signal = tone(170.0, 0.5, range(1, 5)) + 0.3 * noise(0.5)
    assert np.abs(track(signal + 0.5)[2:-2] / 170 - 1).max() < 0.02
    waveforms, lengths, _ = batch(np.tile([0.1, 0.1, 0.1, 0.7], 500))  # 4 kHz: nothing to resample
    x, variance = _low_passed(waveforms, lengths, 4000)
    power = (3 * 0.1**2 + 0.7**2) / 4
    assert x.square().mean().item() == pytest.approx(1)
    assert variance.item() == pytest.approx((power - 0.25**2) / power)


@pytest.mark.parametrize("samples", [0, 1, 100, 159, 160, 161, 400])
def test_short_utterances(samples: int) -> None:
    for result in (features(noise(1.0)[:samples]), features(noise(1.0)[:samples], noise(0.5))):
        assert torch.isfinite(result).all()
        assert not result[0, samples // HOP :].any()
    assert result.shape == (2, 51, 3)


def test_no_utterances_and_no_frames() -> None:
    assert pitch_features(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), RATE, HOP, 4).shape == (0, 4, 3)
    assert pitch_features(torch.zeros(2, 10), torch.tensor([10, 3]), RATE, HOP, 0).shape == (2, 0, 3)


def test_too_few_frames_and_too_low_a_rate_are_refused() -> None:
    waveforms, lengths, _ = batch(noise(0.1))
    with pytest.raises(MpqError, match="room for 10 frames"):
        pitch_features(waveforms, lengths, RATE, HOP, 9)
    with pytest.raises(MpqError, match="at least 4000 Hz, got 2000"):
        pitch_features(waveforms, lengths, 2000, 20, 100)


def test_the_path_is_the_best_of_all_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    local, penalty = torch.rand(3, 5, 4, generator=generator), 0.2 * torch.arange(4.0) ** 2
    valid = torch.tensor([5, 3, 1])
    found = _best_path(local, valid, penalty)
    for n, frames in enumerate(valid.tolist()):

        def cost(path: tuple[int, ...], n: int = n) -> float:
            jumps = sum(float(penalty[abs(a - b)]) for a, b in itertools.pairwise(path))
            return sum(float(local[n, t, k]) for t, k in enumerate(path)) + jumps

        assert tuple(found[n, :frames].tolist()) == min(itertools.product(range(4), repeat=frames), key=cost)


def test_the_features_are_those_of_plain_loops() -> None:
    signal = np.concatenate([noise(0.9), tone(np.linspace(120, 160, 16000), 1.0, range(1, 5)), noise(0.7, 1)])
    waveforms, lengths, frames = batch(signal)
    valid = len(signal) // HOP
    c, f0 = (x[0, :valid].tolist() for x in pitch_track(waveforms, lengths, RATE, HOP, frames))
    x = [math.log(f) for f in f0]
    p = []
    for a in map(abs, c):
        r = -5.2 + 5.4 * math.exp(7.5 * (a - 1)) + 4.8 * a - 2 * math.exp(-10 * a) + 4.2 * math.exp(20 * (a - 1))
        p.append(1 / (1 + math.exp(-r)))
    expected = []
    for t in range(valid):
        around = range(max(0, t - 75), min(valid, t + 76))
        mean = sum(p[s] * x[s] for s in around) / sum(p[s] for s in around)
        at = [x[min(max(t + n, 0), valid - 1)] for n in (-2, -1, 1, 2)]
        slope = (-2 * at[0] - at[1] + at[2] + 2 * at[3]) / 10
        expected.append([2 * ((1.0001 - c[t]) ** 0.15 - 1), 2 * (x[t] - mean), 10 * slope])
    found = pitch_features(waveforms, lengths, RATE, HOP, frames)[0, :valid]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
