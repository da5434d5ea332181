"""From a manifest to batches of waveforms.

Nothing starts on data that cannot be finished: `check_data` decodes every file and looks at every text, and reports
all faults together, those of the manifest's lines among them. An utterance is left out only if the caller says so
(`require_good(..., skip_bad=True)`), and then it is counted, by what is wrong with it.
"""

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mpq.errors import MpqError
from mpq.files import check_input
from mpq.speech.audio import (
    TOLERANCE_SECONDS,
    AudioInfo,
    check_channel,
    pad_batch,
    probe_audio,
    read_audio,
    selected_samples,
)
from mpq.speech.manifests import Fault, Utterance, list_faults, read_manifest
from mpq.speech.text import Tokenizer
from mpq.speech.trn import split_words, trn_fault

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """The demands of a recogniser on data.

    Attributes:
        sample_rate: Hz.
        min_samples: The shortest waveform that it accepts, samples at that rate.
        tokenizer: The recogniser's vocabulary.
    """

    sample_rate: int
    min_samples: int
    tokenizer: Tokenizer


@dataclass(frozen=True)
class CheckedData:
    """The result of `check_data`.

    Attributes:
        utterances: Those without a fault, in the order of the manifest.
        durations: Their durations as measured, seconds.
        faults: One line for each fault, those of the manifest's lines first, each in the order of the manifest.
        skipped: The number of utterances with faults.
        kinds: {kind of fault: the number of faults}.
        notes: What the user should know although it is no fault, a line each.
    """

    utterances: tuple[Utterance, ...]
    durations: tuple[float, ...]
    faults: tuple[str, ...]
    skipped: int
    kinds: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_data(
    utterances: Iterable[Utterance],
    *,
    sample_rate: int,
    min_samples: int = 1,
    channel: str = "error",
    missing: Callable[[str], list[str]] | None = None,
    spelled: Callable[[str], str] | None = None,
    need_text: bool = False,
    decode: bool = True,
    lines: Sequence[Fault] = (),
) -> CheckedData:
    """Returns which utterances can be used, how long they are, and the faults of the others.

    Every audio file is decoded once, so that what passes can be read later with `mpq.speech.audio.read_audio`. A file
    is faulty for all of its segments. The texts of all utterances are looked at, those with faulty audio too.

    Args:
        utterances: The utterances, as `read_data` returns them.
        sample_rate: The model's, Hz.
        min_samples: The fewest samples at that rate that the model accepts.
        channel: The channel that is heard, as in `mpq.speech.audio.read_audio`.
        missing: The model's `Tokenizer.missing`; None is not to look at the words.
        spelled: The model's `Tokenizer.spelled`: a text that it spells with other words is replaced by these, so that
            what is scored is what the vocabulary was checked for. None leaves the texts as they are.
        need_text: Whether an utterance without a transcript is faulty.
        decode: Whether files are decoded to the end; false for data that would take hours.
        lines: The faults that the manifest has already, as `read_manifest` returns them.

    Raises:
        MpqError: `channel` is not one of its values.
    """
    check_channel(channel)
    files: dict[Path, AudioInfo | MpqError] = {}
    good, durations, faults = [], [], list(lines)
    surprises = _Surprises()
    for utterance in utterances:
        found: list[tuple[str, str]] = []  # kind and words
        try:
            samples = _measured_samples(utterance, files, sample_rate, channel, decode)
            if samples < min_samples:
                raise MpqError(
                    f"{utterance.audio_path}: too short: expected at least {min_samples / sample_rate:.3f} s "
                    f"({min_samples} samples at {sample_rate} Hz), got {samples / sample_rate:.3f} s ({samples})"
                )
        except MpqError as error:
            found.append(("audio" if os.path.exists(utterance.audio_path) else "no such audio file", str(error)))
        lacking = _lacking(utterance, missing)
        heard = utterance if lacking or not spelled else _spelled(utterance, spelled)
        found += lacking + _text_faults(heard, need_text)
        faults += [Fault(utterance.source, *one) for one in found]
        if not found:
            surprises.look(utterance, heard, files[utterance.audio_path])
            good.append(heard)
            durations.append(samples / sample_rate)
    skipped = len({fault.source for fault in faults})
    kinds = dict(Counter(fault.kind for fault in faults))
    return CheckedData(tuple(good), tuple(durations), tuple(map(str, faults)), skipped, kinds, tuple(surprises.notes()))


class _Surprises:
    """What is read of good utterances otherwise than a user may think."""

    def __init__(self) -> None:
        self.longer: list[str] = []
        self.overshoot: list[str] = []
        self.spelled: list[str] = []

    def look(self, utterance: Utterance, heard: Utterance, info: AudioInfo | MpqError) -> None:
        assert isinstance(info, AudioInfo), "faulty files are left out"
        seconds, said = info.frames / info.sample_rate, utterance.duration
        if utterance.offset is None and said and seconds > said + TOLERANCE_SECONDS:
            self.longer.append(f"{utterance.source}: {said:.2f} s of the {seconds:.2f} s of {utterance.audio_path}")
        if utterance.offset is not None and said and utterance.offset + said > seconds + TOLERANCE_SECONDS:
            self.overshoot.append(f"{utterance.source}: {utterance.offset + said - seconds:.2f} s")
        if heard.text != utterance.text:
            self.spelled.append(f"{utterance.source}: {heard.text!r}")

    def notes(self) -> list[str]:
        found = [
            (self.longer, "no offset, and a duration that is shorter than the file: only that much is read from 0 s"),
            (self.overshoot, "the segment ends after its recording, and is cut there"),
            (self.spelled, "the text has characters that the tokenizer replaces: what it makes of them is scored"),
        ]
        return [f"{len(which)} utterances: {what} (the first is {which[0]})" for which, what in found if which]


def require_good(checked: CheckedData, skip_bad: bool = False) -> CheckedData:
    """Returns `checked`, if it has no faults or they may be skipped.

    Raises:
        MpqError: There are faults and `skip_bad` is false, or no utterance is left. All faults are in the one error.
    """
    total = checked.skipped + len(checked.utterances)
    if checked.utterances and (skip_bad or not checked.faults):
        if checked.faults:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in checked.kinds.items())
            _log.warning("%d of %d utterances are left out (%s)", checked.skipped, total, kinds)
        for note in checked.notes:
            _log.warning("%s", note)
        return checked
    if not total:
        raise MpqError("no utterances to check; expected at least one")
    remedy = "mend them" if not checked.utterances else "mend them, or leave them out with --skip-bad"
    raise MpqError(list_faults(checked.faults) + f"\n{checked.skipped} of {total} utterances cannot be used; {remedy}")


def batches(utterances: Sequence[Utterance], durations: Sequence[float], max_seconds: float) -> list[list[Utterance]]:
    """Returns the utterances as batches of at most `max_seconds`, padding counted: longest times number of them.

    The longest come first (equals by utt_id), so that a batch has little padding and memory runs out in the first
    batch or never. An utterance that is itself longer than `max_seconds` is a batch of its own.

    Raises:
        MpqError: `max_seconds` is not above 0.
    """
    if not max_seconds > 0:
        raise MpqError(f"batches: expected more than 0 seconds, got {max_seconds:g}")
    result: list[list[Utterance]] = []
    longest = math.inf
    pairs = zip(utterances, durations, strict=True)
    for utterance, seconds in sorted(pairs, key=lambda pair: (-pair[1], pair[0].utt_id)):
        if result and longest * (len(result[-1]) + 1) <= max_seconds:
            result[-1].append(utterance)
        else:
            result.append([utterance])
            longest = seconds
    return result


def calibration_subset(
    utterances: Sequence[Utterance], durations: Sequence[float], max_seconds: float | None, seed: int
) -> tuple[list[Utterance], list[float]]:
    """Returns a random part of the data of at most `max_seconds` (but one utterance at least), and its durations.

    The utterances are taken in the order of SHA-256("seed:utt_id"), those that no longer fit are passed over, and what
    was taken comes out in the order of the manifest. So the choice depends on the seed, the utt_ids and the durations
    alone, not on the order or on a library's generator.

    Args:
        utterances: The checked utterances.
        durations: Their durations, seconds.
        max_seconds: None is all of them.
        seed: Another seed makes another choice.

    Raises:
        MpqError: `max_seconds` is not above 0.
    """
    chosen = list(range(len(utterances)))
    if max_seconds is not None:
        if not 0 < max_seconds < math.inf:
            raise MpqError(f"calibration data: expected more than 0 seconds, or all, got {max_seconds:g}")
        chosen.sort(key=lambda i: hashlib.sha256(f"{seed}:{utterances[i].utt_id}".encode()).digest())
        total = 0.0
        fitting: list[int] = []
        for i in chosen:
            if not fitting or total + durations[i] <= max_seconds:
                total += durations[i]
                fitting.append(i)
        chosen = sorted(fitting)
    return [utterances[i] for i in chosen], [durations[i] for i in chosen]


def _measured_samples(
    utterance: Utterance, files: dict[Path, AudioInfo | MpqError], sample_rate: int, channel: str, decode: bool
) -> int:
    """Returns the samples that `read_audio` will return, or raises why it will not; `files` holds what was probed."""
    path = utterance.audio_path
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long
        raise MpqError(f"{path}: no such file (a relative path starts at the folder of the file that names it)")
    if path not in files:
        try:
            check_input(path)
            files[path] = probe_audio(path, decode)
        except MpqError as error:
            files[path] = error
    info = files[path]
    if isinstance(info, MpqError):
        raise info
    seconds = info.frames / info.sample_rate
    if utterance.offset is None and seconds < (utterance.duration or 0) - TOLERANCE_SECONDS:
        raise MpqError(f"{path}: cut short: expected {utterance.duration:.2f} s as its line says, got {seconds:.2f} s")
    heard = utterance.channel or channel
    return selected_samples(path, info, sample_rate, heard, utterance.offset, utterance.duration)


def _text_faults(utterance: Utterance, need_text: bool) -> list[tuple[str, str]]:
    """Returns the kind and the words of what makes a text unfit to be scored."""
    if not need_text:
        return []
    if utterance.text is None:
        return [("no text", f'"{utterance.utt_id}" has no text; give one')]
    fault = trn_fault(utterance.text)
    return [("markup in the text", f'the text of "{utterance.utt_id}": {fault}')] if fault else []


def _lacking(utterance: Utterance, missing: Callable[[str], list[str]] | None) -> list[tuple[str, str]]:
    """Returns the kind and the words of the characters that the vocabulary lacks."""
    lacking = missing(utterance.text) if missing and utterance.text is not None else []
    if not lacking:
        return []
    names = ", ".join(f"{one!r} (U+{ord(one):04X})" if len(one) == 1 else repr(one) for one in lacking)
    words = f'the text of "{utterance.utt_id}" has what the vocabulary lacks: {names}; replace it'
    return [("text that the vocabulary lacks", words)]


def _spelled(utterance: Utterance, spelled: Callable[[str], str]) -> Utterance:
    """Returns the utterance with the text that the tokenizer makes of it, where that has other words."""
    text = utterance.text and spelled(utterance.text)
    if text is None or utterance.text is None or split_words(text) == split_words(utterance.text):
        return utterance
    return replace(utterance, text=text)


def prepare_data(
    path: Path, model: Listener, *, channel: str = "error", skip_bad: bool = False, need_text: bool = False
) -> CheckedData:
    """Returns the utterances of a manifest or Kaldi directory that the model can work on.

    Args:
        path: The manifest or directory.
        model: Says the sample rate, the shortest waveform and the vocabulary.
        channel: The channel that is heard, as in `mpq.speech.audio.read_audio`.
        skip_bad: Leave faulty utterances out (they are counted in the result).
        need_text: Whether each utterance needs a transcript (that the vocabulary can spell, unless it is a closed one).

    Raises:
        MpqError: All faults, unless they may be skipped.
    """
    manifest = read_manifest(path)
    checked = check_data(
        manifest.utterances,
        sample_rate=model.sample_rate,
        min_samples=model.min_samples,
        channel=channel,
        missing=model.tokenizer.missing if need_text and not model.tokenizer.is_closed else None,
        spelled=model.tokenizer.spelled if need_text else None,
        need_text=need_text,
        lines=manifest.faults,
    )
    require_good(checked, skip_bad)
    for note in manifest.notes:
        _log.info("%s", note)
    return checked


def read_batch(batch: Sequence[Utterance], sample_rate: int, channel: str = "error") -> tuple[Tensor, Tensor]:
    """Returns the (N, S) waveforms of a batch, zero-padded, and their (N,) lengths in samples."""
    return pad_batch(
        [
            read_audio(item.audio_path, sample_rate, item.channel or channel, item.offset, item.duration)
            for item in batch
        ]
    )
