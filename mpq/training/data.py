"""Training data: which utterances form which batch in which epoch, and reading them ahead.

The batches of an epoch depend on the data, the options and the epoch alone, not on the number of processes, each of
which takes its share of the utterances of every batch. So a training gives the same losses on one process and on many
(unless a batch would have fewer utterances than there are processes, which are then put into larger ones).

Legend: N utterances, S samples.
"""

import logging
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpq.config import AugmentConfig, DataConfig
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.heads import Targets
from mpq.speech.audio import AudioReader, pad_batch
from mpq.speech.augment import NoiseSource, augmented, generator
from mpq.speech.data import CheckedData, check_data
from mpq.speech.manifests import Utterance, list_faults, read_data, read_manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """Utterances with their tokens.

    Attributes:
        utterances: The utterances.
        durations: The duration of each of them, seconds.
        tokens: The tokens of each; none for an utterance without a transcript.
        skipped: The number of utterances that were left out because they are faulty.
        too_long: The number of utterances that were left out because they are longer than the recipe's `max_seconds`.
    """

    utterances: tuple[Utterance, ...]
    durations: tuple[float, ...]
    tokens: tuple[list[int], ...]
    skipped: int = 0
    too_long: int = 0


def read_transcripts(config: DataConfig) -> list[str]:
    """Returns the transcripts of the training data, without looking at the audio.

    Raises:
        MpqError: A manifest that cannot be read, or utterances without text.
    """
    utterances = [item for name in config.train for item in read_data(Path(config.root) / name, config.skip_bad)]
    faults = [f'{item.source}: "{item.utt_id}" has no text; give one' for item in utterances if item.text is None]
    if faults and not config.skip_bad:
        raise MpqError(list_faults(faults))
    return [item.text for item in utterances if item.text is not None]


def read_set(
    names: Sequence[str],
    config: DataConfig,
    model: AsrModel,
    fastest: float,
    is_training: bool,
    texts: Literal["needed", "used", "ignored"] = "needed",
) -> TrainingSet:
    """Returns the utterances of manifests, checked: audio (by its header), transcripts, and room for the CTC.

    Args:
        names: The names of the manifests.
        config: The recipe's [data]: the folder of the manifests, and the utterances to leave out.
        model: The model to train, with its sample rate, vocabulary and frames.
        fastest: The highest speed factor that the utterances will be played at.
        is_training: Whether `max_seconds` counts.
        texts: "needed" if each utterance needs a transcript, "used" if those that there are are used, or "ignored" if
            no tokens are made of them.

    Raises:
        MpqError: All faults, unless they may be skipped.
    """
    checked = _checked(names, config, model, fastest, texts)
    limit = config.max_seconds if is_training and config.max_seconds else math.inf
    kept: list[tuple[Utterance, float, list[int]]] = []
    faults, too_long = list(checked.faults), 0
    for item, seconds in zip(checked.utterances, checked.durations, strict=True):
        tokens = [] if texts == "ignored" else model.tokenizer.encode(item.text or "")
        if seconds > limit:
            too_long += 1
        elif fault := _ctc_fault(item, seconds / fastest, tokens, model):
            faults.append(fault)
        else:
            kept.append((item, seconds, tokens))
    total = len(checked.utterances) + checked.skipped
    skipped = total - too_long - len(kept)
    if faults and not (kept and config.skip_bad):
        remedy = "mend them, or leave them out with data.skip_bad = true" if kept else "mend them"
        counted = f"{skipped} of {total} utterances cannot be used; {remedy}"
        raise MpqError(f"{list_faults(faults)}\n{counted}")
    too_dense = len(faults) - len(checked.faults)
    if faults:
        kinds = checked.kinds | ({"text too long for its audio": too_dense} if too_dense else {})
        counted = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
        _log.warning("%d of %d utterances are left out (%s)", skipped, total, counted)
    if not kept:
        raise MpqError(f"data.max_seconds: all {too_long} utterances are longer than {limit:g} s; raise it")
    items, durations, encoded = zip(*kept, strict=True)
    return TrainingSet(items, durations, encoded, skipped=skipped, too_long=too_long)


def _checked(
    names: Sequence[str],
    config: DataConfig,
    model: AsrModel,
    fastest: float,
    texts: Literal["needed", "used", "ignored"],
) -> CheckedData:
    """Returns the utterances of manifests with what is wrong with them; the arguments are those of `read_set`."""
    manifests = [read_manifest(Path(config.root) / name) for name in names]
    checked = check_data(
        [item for manifest in manifests for item in manifest.utterances],
        sample_rate=model.sample_rate,
        min_samples=math.ceil(model.min_samples * fastest) + 1,
        channel=config.channel,
        missing=None if texts == "ignored" else model.tokenizer.missing,
        spelled=None if texts == "ignored" else model.tokenizer.spelled,
        need_text=texts == "needed",
        decode=False,
        lines=[fault for manifest in manifests for fault in manifest.faults],
    )
    for note in [note for manifest in manifests for note in manifest.notes]:
        _log.info("%s", note)
    for note in checked.notes:
        _log.warning("%s", note)
    return checked


def _ctc_fault(item: Utterance, seconds: float, tokens: list[int], model: AsrModel) -> str | None:
    """Returns why the CTC cannot align an utterance: it needs a frame for each token and between equal neighbours."""
    samples = torch.tensor([int(seconds * model.sample_rate) - 1])
    frames = int(model.encoded_lengths(model.feature_lengths(samples)))
    needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))
    if needed <= frames:
        return None
    return (
        f'{item.source}: "{item.utt_id}": too long a text for its {seconds:.2f} s (at the highest speed): '
        f"the CTC needs {needed} frames for {len(tokens)} tokens, the audio has {frames}; mend the text or the audio"
    )


def plan_epoch(
    durations: Sequence[float], hop_seconds: float, batch_frames: int, seed: int, epoch: int, least: int = 1
) -> list[list[int]]:
    """Returns the batches of an epoch, in the order in which they are trained, as indices of utterances.

    Utterances of about the same length are together (sorted by duration times a random factor of 0.9 to 1.1), a batch
    has at most `batch_frames` frames, padding counted (but `least` utterances), and the batches are shuffled.

    Args:
        durations: The utterances' durations, seconds.
        hop_seconds: The time from one feature frame to the next.
        batch_frames: The most frames of a batch.
        seed, epoch: The keys of the random choices.
        least: The fewest utterances of a batch: the number of processes.

    Raises:
        MpqError: Fewer than `least` utterances.
    """
    if len(durations) < least:
        raise MpqError(f"train: expected an utterance or more for each of {least} processes, got {len(durations)}")
    random = generator(seed, epoch, "", "plan")
    frames = np.ceil(np.asarray(durations) / hop_seconds)
    order = np.argsort(-frames * random.uniform(0.9, 1.1, len(frames)), kind="stable")
    plan: list[list[int]] = []
    longest = 0.0
    for index in order.tolist():
        longest = max(longest, frames[index]) if plan else frames[index]
        if plan and (len(plan[-1]) < least or longest * (len(plan[-1]) + 1) <= batch_frames):
            plan[-1].append(index)
        else:
            plan.append([index])
            longest = frames[index]
    if len(plan) > 1 and len(plan[-1]) < least:
        last = plan.pop()
        plan[-1] += last
    random.shuffle(plan)
    return plan


class _Waveforms(Dataset["tuple[Tensor, Tensor] | MpqError"]):
    """(epoch, batch) -> the batch's waveforms, augmented."""

    def __init__(self, data: TrainingSet, config: AugmentConfig, reader: AudioReader, seed: int) -> None:
        self.data, self.config, self.reader, self.seed = data, config, reader, seed
        self.noise = NoiseSource(config.noise, data.utterances, reader) if config.noise else None

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> tuple[Tensor, Tensor] | MpqError:
        try:
            return pad_batch(self._augmented(*key))
        except MpqError as error:  # a loader's process would bury it in a traceback
            return error

    def _augmented(self, epoch: int, indices: Sequence[int]) -> list[Tensor]:
        waveforms = []
        for index in indices:
            item = self.data.utterances[index]
            waveform = self.reader.read(item.audio_path, item.offset, item.duration, item.channel)
            random = generator(self.seed, epoch, item.utt_id, "audio")
            waveforms.append(augmented(waveform, self.config, self.noise, self.reader.sample_rate, random))
        return waveforms


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole process group; a reader goes on until the training has stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class BatchReader:
    """Reads and augments batches, ahead of time where there are workers.

    Args:
        data: The utterances.
        config: The augmentation of the audio.
        model: The model to train, with its sample rate.
        channel: The channel to read, such as "error" or "mix" (`mpq.speech.audio.read_audio`).
        seed: The key of the augmentation's random choices.
        workers: The number of processes that read ahead, one for each core at most; 0 for none.

    Raises:
        MpqError: A source of noise that is not there.
    """

    def __init__(
        self, data: TrainingSet, config: AugmentConfig, model: AsrModel, channel: str, seed: int, workers: int
    ) -> None:
        self._data = data
        self._keys: list[tuple[int, tuple[int, ...]]] = []  # (epoch, batch) of the plan that is read
        self._loader = DataLoader(
            _Waveforms(data, config, AudioReader(model.sample_rate, channel), seed),
            batch_size=None,
            sampler=self._keys,
            num_workers=(readers := min(workers, os.cpu_count() or 1)),
            worker_init_fn=_ignore_signals,
            persistent_workers=readers > 0,  # with what they have decoded
        )

    def read(self, epoch: int, plan: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor, Targets]]:
        """Yields the (N, S) waveforms, their (N,) lengths and the targets of each batch of a plan; one plan at a time.

        Raises:
            MpqError: An audio file cannot be read.
        """
        self._keys[:] = [(epoch, tuple(batch)) for batch in plan]
        for found, batch in zip(self._loader, plan, strict=True):
            if isinstance(found, MpqError):
                raise found
            waveforms, lengths = found
            yield waveforms, lengths, Targets.of([self._data.tokens[index] for index in batch])
