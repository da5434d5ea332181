"""Augmentation of training audio: speed perturbation, additive noise, level, SpecAugment.

Every random choice is drawn from a generator whose seed is that of the training, the epoch and the utterance's id. So
an utterance is changed in the same way whatever batch it is in, whichever process reads it, and whether the training
was interrupted before.

Legend: S samples, T feature frames, F features.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpq.config import SYNTHETIC_NOISE, AugmentConfig
from mpq.errors import MpqError
from mpq.speech.audio import AudioReader, read_audio
from mpq.speech.manifests import Utterance

BABBLE_TALKERS = 6
"""Utterances whose sum is babble noise."""
_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".sph")


def generator(seed: int, epoch: int, utt_id: str, what: str) -> np.random.Generator:
    """Returns the generator of one utterance's choices in one epoch; `what` tells several of them apart."""
    digest = hashlib.sha256(f"{seed}:{epoch}:{utt_id}:{what}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def changed_speed(waveform: Tensor, factor: float, sample_rate: int) -> Tensor:
    """Returns (S / factor,) samples: faster (and higher) for a factor above 1, by resampling (Ko et al. 2015)."""
    rate = round(sample_rate * factor)
    return waveform if rate == sample_rate else _resampler(rate, sample_rate)(waveform)


@lru_cache(maxsize=16)
def _resampler(rate: int, sample_rate: int) -> Callable[[Tensor], Tensor]:
    """Returns `torchaudio.functional.resample`, bit for bit, with its filter computed once."""
    from torchaudio.transforms import Resample

    resampler: Callable[[Tensor], Tensor] = Resample(rate, sample_rate, dtype=torch.float32)
    return resampler


class NoiseSource:
    """Noise of the kinds that a recipe names.

    Args:
        names: "white", "babble", and absolute paths of recordings or of folders with recordings.
        utterances: The utterances that babble is made of.
        reader: Reads the utterances, and says the sample rate; recordings of noise are mixed down.

    Raises:
        MpqError: A path leads to no recording.
    """

    def __init__(self, names: Sequence[str], utterances: Sequence[Utterance], reader: AudioReader) -> None:
        self.utterances, self.reader = utterances, reader
        self.sources: list[list[Path | str]] = []
        for name in names:
            files: list[Path | str] = [name] if name in SYNTHETIC_NOISE else [*_recordings(Path(name))]
            if not files:
                raise MpqError(f"noise: {name}: no recording; expected {', '.join(_SUFFIXES)} files")
            self.sources.append(files)

    def draw(self, samples: int, random: np.random.Generator) -> Tensor:
        """Returns (samples,) of noise: a source is drawn, then a recording and a place in it."""
        files = self.sources[random.integers(len(self.sources))]
        file = files[random.integers(len(files))]
        if file == "white":
            return torch.from_numpy(random.standard_normal(samples).astype(np.float32))
        if file == "babble":
            return self._babble(samples, random)
        recording = _recording(Path(file), self.reader.sample_rate)
        return _looped(recording, samples, int(random.integers(len(recording))))

    def _babble(self, samples: int, random: np.random.Generator) -> Tensor:
        """Returns the sum of several utterances at one level, backwards, so that no words are in it."""
        total = torch.zeros(samples)
        for index in random.integers(len(self.utterances), size=BABBLE_TALKERS):
            item = self.utterances[index]
            speech = self.reader.read(item.audio_path, item.offset, item.duration, item.channel).flip(0)
            level = speech.square().mean().sqrt().clamp(min=1e-5)
            total += _looped(speech, samples, int(random.integers(len(speech)))) / level
        return total


def _recordings(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
    return [path] if path.is_file() else []


@lru_cache(maxsize=64)
def _recording(path: Path, sample_rate: int) -> Tensor:
    return read_audio(path, sample_rate, "mix")


def _looped(noise: Tensor, samples: int, start: int) -> Tensor:
    """Returns (samples,) of a recording from `start` on, starting over at its end."""
    head = noise[start : start + samples]
    left = samples - len(head)
    return torch.cat((head, noise.repeat(left // len(noise)), noise[: left % len(noise)]))


def with_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Returns the sum of (S,) speech and (S,) noise at a signal-to-noise ratio; silence is left as it is."""
    powers = [one.square().mean() for one in (waveform, noise)]
    if not min(powers) > 0:
        return waveform
    return waveform + noise * (powers[0] / powers[1] / 10 ** (snr_db / 10)).sqrt()


def augmented(
    waveform: Tensor, config: AugmentConfig, noise: NoiseSource | None, sample_rate: int, random: np.random.Generator
) -> Tensor:
    """Returns the waveform (S,) with speed, noise and level as drawn from `random`."""
    waveform = changed_speed(waveform, config.speed[random.integers(len(config.speed))], sample_rate)
    if noise is not None and random.random() < config.noise_probability:
        waveform = with_noise(waveform, noise.draw(len(waveform), random), random.uniform(*config.snr_db))
    if config.level_db != (0.0, 0.0):
        waveform = waveform * 10 ** (random.uniform(*config.level_db) / 20)
    return waveform


def spec_mask(frames: int, bands: int, config: AugmentConfig, random: np.random.Generator) -> Tensor:
    """Returns the (frames, bands) bool mask of SpecAugment (Park et al. 2019): true is to be zeroed.

    Unlike torchaudio's transform, a time mask is never wider than a part of the utterance's own valid frames, and the
    masks come from the utterance's generator. Zero is each band's mean, where the features are normalised.
    """
    mask = torch.zeros(frames, bands, dtype=torch.bool)
    widest = min(config.time_mask_width, int(frames * config.time_mask_fraction))
    for _ in range(config.time_masks):
        width = random.integers(widest + 1)
        start = random.integers(frames - width + 1)
        mask[start : start + width] = True
    for _ in range(config.frequency_masks):
        width = random.integers(min(config.frequency_mask_width, bands) + 1)
        start = random.integers(bands - width + 1)
        mask[:, start : start + width] = True
    return mask
