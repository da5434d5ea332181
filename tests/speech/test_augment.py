"""Augmentation, measured: the pitch and length of changed speed, the signal-to-noise ratio, where the masks are."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from tiny_training import RATE, TEXTS, write_speech

from mpq.config import AugmentConfig
from mpq.errors import MpqError
from mpq.speech.audio import AudioReader
from mpq.speech.augment import (
    BABBLE_TALKERS,
    NoiseSource,
    _looped,
    augmented,
    changed_speed,
    generator,
    spec_mask,
    with_noise,
)
from mpq.speech.manifests import Utterance, read_data


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> torch.Tensor:
    time = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    return torch.sin(2 * torch.pi * hertz * time).float()


def peak_hertz(waveform: torch.Tensor, rate: int = RATE) -> float:
    spectrum = np.abs(np.fft.rfft(waveform.numpy() * np.hanning(len(waveform))))
    return float(np.argmax(spectrum)) * rate / len(waveform)


def snr_db(speech: torch.Tensor, noise: torch.Tensor) -> float:
    return float(10 * torch.log10(speech.double().square().mean() / noise.double().square().mean()))


@pytest.fixture
def utterances(tmp_path: Path) -> list[Utterance]:
    return read_data(write_speech(tmp_path / "speech"))


# ---- speed


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 2.0, 0.5])
def test_speed_changes_length_and_pitch(factor: float, rate: int) -> None:
    waveform = tone(500, rate=rate)
    changed = changed_speed(waveform, factor, rate)
    assert abs(len(changed) - len(waveform) / factor) <= 1
    assert peak_hertz(changed, rate) == pytest.approx(500 * factor, abs=2)
    middle = changed[len(changed) // 4 : -len(changed) // 4]
    assert float(middle.square().mean()) == pytest.approx(0.5, rel=0.01)  # as loud as before


@pytest.mark.parametrize(("factor", "rate"), [(0.9, 8000), (1.1, 16000), (0.95, 44100), (1.013, 8000)])
def test_a_kept_filter_gives_the_very_samples_of_a_new_one(factor: float, rate: int) -> None:
    waveform = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for part in (waveform, waveform[:777]):
        expected = torchaudio.functional.resample(part, round(rate * factor), rate)
        assert torch.equal(changed_speed(part, factor, rate), expected)


def test_speed_1_changes_nothing() -> None:
    waveform = tone(300)
    assert changed_speed(waveform, 1.0, RATE) is waveform


# ---- noise


@pytest.mark.parametrize("snr", [-5.0, 0.0, 17.5])
def test_noise_has_the_ratio_asked_for(snr: float) -> None:
    speech, noise = 0.3 * tone(500), 7 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    noisy = with_noise(speech, noise, snr)
    assert snr_db(speech, noisy - speech) == pytest.approx(snr, abs=0.01)
    added = (noisy - speech) / noise
    torch.testing.assert_close(added, added.median().expand_as(added), rtol=1e-2, atol=1e-4)  # that noise, scaled


@pytest.mark.parametrize("silent", ["speech", "noise"])
def test_silence_is_left_as_it_is(silent: str) -> None:
    speech, noise = tone(500), tone(900)
    (speech if silent == "speech" else noise).zero_()
    assert torch.equal(with_noise(speech, noise, 10.0), speech)


def test_white_noise_is_white(utterances: list[Utterance]) -> None:
    noise = NoiseSource(["white"], utterances, AudioReader(RATE, "error")).draw(40000, np.random.default_rng(0))
    assert noise.shape == (40000,) and noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    bands = np.abs(np.fft.rfft(noise.numpy())[1:]).reshape(8, -1) ** 2
    assert bands.mean(axis=1) == pytest.approx(bands.mean(), rel=0.1)


def test_babble_is_utterances_at_one_level(tmp_path: Path) -> None:
    """A tone of its own for each utterance, of very different loudness: in the sum each is heard."""
    lines = []
    for index, hertz in enumerate((500, 1000, 2000)):
        soundfile.write(tmp_path / f"t{index}.wav", 0.5 * 10.0**-index * tone(hertz).numpy(), RATE, subtype="FLOAT")
        lines.append(f'{{"audio_filepath": "t{index}.wav"}}\n')
    (tmp_path / "tones.jsonl").write_text("".join(lines))
    source = NoiseSource(["babble"], read_data(tmp_path / "tones.jsonl"), AudioReader(RATE, "error"))
    powers = np.zeros(3)
    for seed in range(8):
        noise = source.draw(2 * RATE, np.random.default_rng(seed))  # longer than each of them: they start over
        assert noise.shape == (2 * RATE,)
        spectrum = np.abs(np.fft.rfft(noise.numpy())) ** 2
        powers += spectrum[[1000, 2000, 4000]]
        assert spectrum[[1000, 2000, 4000]].sum() > 0.99 * spectrum.sum()
    assert powers.max() < 8 * powers.min()


def test_babble_by_hand(tmp_path: Path) -> None:
    """Of one utterance: six copies, backwards, from random starts, each with a mean square of 1."""
    speech = np.linspace(0.0, 0.5, 1000) ** 2
    soundfile.write(tmp_path / "ramp.wav", speech, RATE, subtype="FLOAT")
    (tmp_path / "ramp.jsonl").write_text('{"audio_filepath": "ramp.wav"}\n')
    noise = NoiseSource(["babble"], read_data(tmp_path / "ramp.jsonl"), AudioReader(RATE, "error"))
    found = noise.draw(2000, np.random.default_rng(0)).numpy()
    backwards = speech[::-1] / np.sqrt(np.mean(speech**2))
    random = np.random.default_rng(0)
    random.integers(1), random.integers(1), random.integers(1, size=BABBLE_TALKERS)  # which source, file, utterances
    copies = [np.tile(np.roll(backwards, -int(random.integers(1000))), 2) for _ in range(6)]
    np.testing.assert_allclose(found, np.sum(copies, axis=0), rtol=1e-4, atol=1e-4)


def test_recordings_are_looped_from_a_random_start(tmp_path: Path, utterances: list[Utterance]) -> None:
    folder = tmp_path / "noise"
    (folder / "deeper").mkdir(parents=True)
    ramp = np.linspace(-0.5, 0.5, 1000)
    soundfile.write(folder / "deeper" / "ramp.flac", ramp, RATE)
    (folder / "notes.txt").write_text("no recording")
    source = NoiseSource([str(folder)], utterances, AudioReader(RATE, "error"))
    starts = set()
    for seed in range(5):
        noise = source.draw(2500, np.random.default_rng(seed)).numpy()
        assert len(noise) == 2500
        start = int(np.argmin(np.abs(ramp - noise[0])))
        np.testing.assert_allclose(noise, ramp[(np.arange(2500) + start) % 1000], atol=1e-3)
        starts.add(start)
    assert len(starts) > 2
    one = NoiseSource([str(folder / "deeper" / "ramp.flac")], utterances, AudioReader(RATE, "error"))
    assert len(one.draw(10, np.random.default_rng(0))) == 10


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 40, 95])
@pytest.mark.parametrize("start", [0, 3, 9])
def test_looping_is_counting_modulo_the_length(samples: int, start: int) -> None:
    noise = torch.arange(10.0)
    assert torch.equal(_looped(noise, samples, start), (torch.arange(samples) + start) % 10.0)
    assert torch.equal(_looped(noise[:1], samples, 0), torch.zeros(samples))


def test_stereo_recordings_of_another_rate_are_mixed_and_resampled(tmp_path: Path, utterances: list[Utterance]) -> None:
    both = np.stack([tone(1000, rate=16000).numpy(), np.zeros(16000)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", both, 16000)
    source = NoiseSource([str(tmp_path / "stereo.wav")], utterances, AudioReader(RATE, "error"))
    noise = source.draw(RATE, np.random.default_rng(0))
    assert peak_hertz(noise) == pytest.approx(1000, abs=1)
    assert float(noise.square().mean()) == pytest.approx(0.125, rel=0.05)


def test_all_sources_are_drawn(tmp_path: Path, utterances: list[Utterance]) -> None:
    soundfile.write(tmp_path / "hum.wav", tone(50).numpy(), RATE)
    source = NoiseSource(["white", "babble", str(tmp_path / "hum.wav")], utterances, AudioReader(RATE, "error"))
    hum = sum(peak_hertz(source.draw(RATE, np.random.default_rng(seed))) == 50 for seed in range(60))
    assert 8 <= hum <= 32


@pytest.mark.parametrize("is_there", [True, False])
def test_noise_without_a_recording_is_refused(is_there: bool, tmp_path: Path, utterances: list[Utterance]) -> None:
    folder = tmp_path / "noise"
    if is_there:
        folder.mkdir()
        (folder / "readme.txt").write_text("")
    with pytest.raises(MpqError, match=r"^noise: .*noise: no recording; expected \.wav, \.flac"):
        NoiseSource(["white", str(folder)], utterances, AudioReader(RATE, "error"))


# ---- what is drawn


def test_augmentation_depends_on_seed_epoch_and_utterance_alone(utterances: list[Utterance]) -> None:
    config = AugmentConfig(speed=[0.9, 1.0, 1.1], noise=["white", "babble"], noise_probability=1.0)
    noise = NoiseSource(config.noise, utterances, AudioReader(RATE, "error"))

    def made(seed: int, epoch: int, utt_id: str) -> torch.Tensor:
        return augmented(tone(500), config, noise, RATE, generator(seed, epoch, utt_id, "audio"))

    first = made(0, 1, "a")
    made(3, 3, "c")
    assert torch.equal(first, made(0, 1, "a"))
    for other in (made(1, 1, "a"), made(0, 2, "a"), made(0, 1, "b")):
        assert len(first) != len(other) or not torch.equal(first, other)


def test_generators_of_different_purposes_differ() -> None:
    keys = [(0, 0, "a", "audio"), (0, 0, "a", "mask"), (0, 0, "b", "audio"), (0, 1, "a", "audio"), (1, 0, "a", "audio")]
    assert len({generator(*key).integers(2**62) for key in keys}) == len(keys)


def test_speeds_noise_and_ratios_are_drawn_as_the_recipe_says(utterances: list[Utterance]) -> None:
    """No random choice is left where the speed is 1: noise of the ratio, in so many of the utterances."""
    config = AugmentConfig(speed=[1.0], noise=["white"], noise_probability=0.3, snr_db=(5.0, 10.0))
    noise, speech = NoiseSource(config.noise, utterances, AudioReader(RATE, "error")), tone(500, 0.1)
    ratios = []
    for epoch in range(300):
        found = augmented(speech, config, noise, RATE, generator(0, epoch, "a", "audio"))
        if not torch.equal(found, speech):
            ratios.append(snr_db(speech, found - speech))
    assert 60 < len(ratios) < 120
    assert 5 <= min(ratios) < 5.5 and 9.5 < max(ratios) <= 10.001
    lengths = [
        len(augmented(speech, AugmentConfig(speed=[0.8, 1.0, 1.25]), None, RATE, generator(0, epoch, "a", "audio")))
        for epoch in range(300)
    ]
    counts = {length: lengths.count(length) for length in set(lengths)}
    assert counts.keys() == {640, 800, 1000} and min(counts.values()) > 70


def test_the_level_is_drawn_in_decibels_and_changes_nothing_else(utterances: list[Utterance]) -> None:
    """Even over its range, the same for the whole utterance, after the noise, whose ratio it leaves."""
    speech, config = tone(500, 0.1), AugmentConfig(level_db=(-12.0, 6.0))
    gains = []
    for epoch in range(300):
        found = augmented(speech, config, None, RATE, generator(0, epoch, "a", "audio"))
        gain = float(found.abs().max() / speech.abs().max())
        torch.testing.assert_close(found, speech * gain)
        gains.append(20 * np.log10(gain))
    assert -12 <= min(gains) < -11.5 and 5.5 < max(gains) <= 6
    counts, _ = np.histogram(gains, bins=6, range=(-12, 6))
    assert counts.min() > 30
    noise = NoiseSource(["white"], utterances, AudioReader(RATE, "error"))
    options = {"noise": ["white"], "noise_probability": 1.0, "snr_db": (3.0, 3.0)}
    for epoch in range(5):  # the level is drawn last, so the rest is as without it
        plain, louder = (
            augmented(speech, AugmentConfig(**options, **more), noise, RATE, generator(0, epoch, "a", "audio"))
            for more in ({}, {"level_db": (6.0206, 6.0206)})
        )
        torch.testing.assert_close(louder, 2 * plain, rtol=1e-4, atol=1e-5)
    still = augmented(speech, AugmentConfig(level_db=(0.0, 0.0)), None, RATE, generator(0, 0, "a", "audio"))
    assert torch.equal(still, speech)


# ---- SpecAugment


def runs(mask: np.ndarray) -> list[int]:
    """Returns the lengths of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize(("frames", "widest"), [(200, 15), (40, 8), (4, 0), (1, 0)])
def test_masks_are_within_their_bounds(frames: int, widest: int) -> None:
    """A fifth of the utterance at most, or 15 frames; 6 bands. One mask of each kind, so that none join."""
    config = AugmentConfig(time_masks=1, time_mask_width=15, frequency_masks=1, frequency_mask_width=6)
    times, bands = set(), set()
    for seed in range(400):
        mask = spec_mask(frames, 20, config, np.random.default_rng(seed)).numpy()
        assert mask.shape == (frames, 20)
        time, band = runs(mask.all(axis=1)), runs(mask.all(axis=0))
        assert len(time) <= 1 and len(band) <= 1
        assert np.array_equal(mask, mask.all(axis=1)[:, None] | mask.all(axis=0)[None])
        times.add(sum(time))
        bands.add(sum(band))
    assert times == set(range(widest + 1)) and bands == set(range(7))
    if widest:
        ends = [spec_mask(frames, 20, config, np.random.default_rng(seed))[[0, -1]].all(dim=1) for seed in range(400)]
        assert torch.stack(ends).any(dim=0).all()  # the first frame and the last


def test_the_number_of_masks() -> None:
    config = AugmentConfig(time_masks=3, time_mask_width=5, frequency_masks=0, time_mask_fraction=1.0)
    counts = [len(runs(spec_mask(1000, 4, config, np.random.default_rng(seed)).all(1).numpy())) for seed in range(50)]
    assert max(counts) == 3
    none = AugmentConfig(time_masks=0, frequency_masks=0)
    assert not spec_mask(50, 8, none, np.random.default_rng(0)).any()


def test_masks_wider_than_the_features() -> None:
    config = AugmentConfig(time_masks=2, time_mask_width=100, time_mask_fraction=1.0, frequency_mask_width=100)
    masks = [spec_mask(3, 2, config, np.random.default_rng(seed)) for seed in range(50)]
    assert any(mask.all() for mask in masks) and not all(mask.all() for mask in masks)


def test_the_texts_are_those_that_the_tests_need() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 10
