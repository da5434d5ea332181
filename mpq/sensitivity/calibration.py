"""Calibration audio: utterances to look at a model with, drawn at random, and found again later.

A file says how its audio was drawn and the fingerprint of the samples, so that a later step draws the same audio, and
audio that no earlier step has seen.

Weights that are rounded by what layers hear suit that audio best, and other speech less. Audio that is varied suits
more: a quarter of the utterances is cut into pieces of 1 to 3 s, and another quarter into such pieces at half the
bandwidth, as a telephone has it (docs/rounding.md has what that is worth).

Legend: N utterances, S samples, T feature frames, F features.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.speech.audio import pad_batch
from mpq.speech.augment import generator
from mpq.speech.data import batches, calibration_subset, prepare_data, read_batch
from mpq.speech.manifests import Utterance

BATCH_SECONDS = 40.0
"""Padded audio in a batch of calibration data."""
CALIBRATION_SECONDS = 300.0
"""Audio that statistics are collected from, unless another length is asked for."""
HELD_OUT_SECONDS = 300.0
"""Audio that the divergence of a whole model is measured on, and as much that decides on moves."""


@dataclass(frozen=True)
class CalibrationData:
    """Audio to look at a model with.

    Attributes:
        path: The manifest or directory.
        max_seconds, seed: The options of the draw (`mpq.speech.data.calibration_subset`); max_seconds None is all.
        channel, skip_bad: As in `mpq.speech.data.prepare_data`.
        utterances, durations: The utterances that were drawn, and the seconds of each.
        rest, rest_durations: The utterances that were not drawn, and the seconds of each.
        is_varied: Whether half of the utterances were cut into pieces, half of these at half the bandwidth (`varied`).
            A piece is an utterance of its own.
        skipped: The number of faulty utterances that were left out.
        waveforms: ((1, S) samples, (1,) length) of each utterance that was drawn.
        sha256: The fingerprint of the waveforms.
    """

    path: Path
    max_seconds: float | None
    seed: int
    channel: str
    skip_bad: bool
    utterances: tuple[Utterance, ...]
    durations: tuple[float, ...]
    rest: tuple[Utterance, ...]
    rest_durations: tuple[float, ...]
    skipped: int
    waveforms: tuple[tuple[Tensor, Tensor], ...]
    sha256: str
    is_varied: bool = False

    @property
    def seconds(self) -> float:
        """The length of the audio that was drawn, to the millisecond."""
        return round(math.fsum(self.durations), 3)

    def to_json(self) -> dict[str, Any]:
        """Returns the "data" object of a sensitivity file, from which `redraw` finds the same audio."""
        return {
            "path": str(self.path),
            "utterances": len(self.utterances),
            "seconds": self.seconds,
            "max_seconds": self.max_seconds,
            "seed": self.seed,
            "channel": self.channel,
            "skip_bad": self.skip_bad,
            "skipped": self.skipped,
            "left_seconds": round(sum(self.rest_durations), 3),
            **({"varied": True} if self.is_varied else {}),
            "sha256": self.sha256,
        }


def unseen(
    model: AsrModel, path: Path, seed: int = 0, channel: str = "error", skip_bad: bool = False
) -> CalibrationData:
    """Returns the data of a file with nothing drawn from them yet.

    Raises:
        MpqError: Bad data, all of its faults at once.
    """
    checked = prepare_data(path, model, channel=channel, skip_bad=skip_bad)
    return CalibrationData(
        path=path,
        max_seconds=None,
        seed=seed,
        channel=channel,
        skip_bad=skip_bad,
        utterances=(),
        durations=(),
        rest=checked.utterances,
        rest_durations=checked.durations,
        skipped=checked.skipped,
        waveforms=(),
        sha256="",
    )


def draw(
    model: AsrModel,
    path: Path,
    max_seconds: float | None,
    seed: int = 0,
    channel: str = "error",
    skip_bad: bool = False,
    is_varied: bool = False,
) -> CalibrationData:
    """Returns a random part of the data, at most `max_seconds` of audio (None: all), and the utterances that are left.

    Raises:
        MpqError: Bad data, all of its faults at once.
    """
    drawn = further(model, unseen(model, path, seed, channel, skip_bad), max_seconds)
    return varied(model, drawn) if is_varied else drawn


def further(model: AsrModel, data: CalibrationData, max_seconds: float | None) -> CalibrationData:
    """Returns a random part of the audio that `data` left of its file; an empty part where nothing is left.

    Args:
        model: The model that is to hear it.
        data: The audio that was drawn before.
        max_seconds: The most audio to draw; None is all.
    """
    utterances, durations = calibration_subset(data.rest, data.rest_durations, max_seconds, data.seed)
    drawn = {utterance.utt_id for utterance in utterances}
    rest = [pair for pair in zip(data.rest, data.rest_durations, strict=True) if pair[0].utt_id not in drawn]
    waveforms = tuple(read_batch([utterance], model.sample_rate, data.channel) for utterance in utterances)
    return replace(
        data,
        max_seconds=max_seconds,
        utterances=tuple(utterances),
        durations=tuple(durations),
        rest=tuple(utterance for utterance, _ in rest),
        rest_durations=tuple(seconds for _, seconds in rest),
        waveforms=waveforms,
        sha256=_fingerprint(waveforms),
        is_varied=False,
    )


def varied(model: AsrModel, data: CalibrationData) -> CalibrationData:
    """Returns the audio with half of its utterances, as the seed chooses, cut into pieces, half of these at half the
    bandwidth.

    Args:
        model: The model that is to hear it.
        data: The audio.
    """
    rate = model.sample_rate
    utterances, waveforms = [], []
    for utterance, (samples, _) in zip(data.utterances, data.waveforms, strict=True):
        random = generator(data.seed, 0, utterance.utt_id, "variety")
        way = random.random()
        if way < 0.5:
            pieces = [samples[0]]
        else:
            heard = samples[0] if way < 0.75 else _half_bandwidth(samples[0])
            pieces = _cut(heard, random, rate)
        for number, piece in enumerate(pieces):
            name = f"{utterance.utt_id}#{number}" if way >= 0.5 else utterance.utt_id
            utterances.append(replace(utterance, utt_id=name))
            waveforms.append((piece[None], torch.tensor([len(piece)])))
    return replace(
        data,
        utterances=tuple(utterances),
        durations=tuple(len(samples[0]) / rate for samples, _ in waveforms),
        waveforms=tuple(waveforms),
        sha256=_fingerprint(waveforms),
        is_varied=True,
    )


def _cut(samples: Tensor, random: np.random.Generator, rate: int) -> list[Tensor]:
    """Returns pieces of (S,) samples of 1 to 3 s each; the last one may have up to 4."""
    pieces = []
    while len(samples) >= 4 * rate:
        end = int(random.uniform(1, 3) * rate)
        pieces.append(samples[:end])
        samples = samples[end:]
    return [*pieces, samples]


def _half_bandwidth(samples: Tensor) -> Tensor:
    """Returns (S,) samples without the upper half of their frequencies."""
    halved = resample_poly(resample_poly(samples.numpy(), 1, 2), 2, 1)[: len(samples)]
    return torch.from_numpy(np.ascontiguousarray(halved, dtype=np.float32))


def _fingerprint(waveforms: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Returns the SHA-256 of ((1, S) samples, (1,) length) of all utterances."""
    digest = hashlib.sha256()
    for samples, lengths in waveforms:
        digest.update(lengths.numpy().tobytes())
        digest.update(samples.numpy().tobytes())
    return digest.hexdigest()


def redraw(model: AsrModel, data: dict[str, Any], path: Path | None = None) -> CalibrationData:
    """Returns the audio that the "data" object of a sensitivity or allocation file describes.

    Args:
        model: The model that is to hear it.
        data: The object that `CalibrationData.to_json` wrote.
        path: The place of the data now; None: where they were.

    Raises:
        MpqError: The object does not say how the audio was drawn, or other audio is drawn now.
    """
    missing = [key for key in ("path", "max_seconds", "seed", "channel", "skip_bad", "sha256") if key not in data]
    if missing:
        raise MpqError(
            f"the sensitivities do not say which audio they were measured on (their data has no {missing[0]!r}); "
            "measure them again"
        )
    where = path or Path(str(data["path"]))
    try:
        how = (data["max_seconds"], data["seed"], data["channel"], data["skip_bad"], bool(data.get("varied")))
        drawn = draw(model, where, *how)
    except TypeError as error:
        raise MpqError(
            f"the sensitivities do not say how to draw the audio that they were measured on: {error}"
        ) from None
    if drawn.sha256 != data["sha256"]:
        raise MpqError(
            f"{where}: not the audio that the sensitivities were measured with (it changed since, or is other data); "
            "give that data with --data, or measure again"
        )
    return drawn


def one_by_one(model: AsrModel, data: CalibrationData) -> list[tuple[Tensor, Tensor]]:
    """Returns ((1, T, F) features, (1,) frames) of each utterance, on the model's device."""
    where = next(model.parameters()).device
    with torch.no_grad():  # not inference mode: a backward pass will start from these
        found = [model.features(samples.to(where), lengths.to(where)) for samples, lengths in data.waveforms]
    return [(features[:, : int(lengths)], lengths) for features, lengths in found]  # some features end with padding


def in_batches(model: AsrModel, data: CalibrationData, max_seconds: float) -> list[tuple[Tensor, Tensor]]:
    """Returns ((N, T, F) features, (N,) frames) of batches of at most `max_seconds`, on the model's device."""
    where = next(model.parameters()).device
    waveforms = {utterance.utt_id: pair for utterance, pair in zip(data.utterances, data.waveforms, strict=True)}
    found = []
    for batch in batches(data.utterances, data.durations, max_seconds):
        samples, lengths = pad_batch([waveforms[utterance.utt_id][0][0] for utterance in batch])
        with torch.no_grad():
            found.append(model.features(samples.to(where), lengths.to(where)))
    return found
