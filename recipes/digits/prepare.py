"""A corpus of connected digits in noise, from the recordings of the Free Spoken Digit Dataset (FSDD).

    python recipes/digits/prepare.py /path/free-spoken-digit-dataset/recordings data/digits [--sets NAME ...]

It reads 3,000 recordings of six speakers who say each digit 50 times, {digit}_{speaker}_{take}.wav (or .flac with the
same samples), 8 kHz, 16 bit, from https://github.com/Jakobovski/free-spoken-digit-dataset at commit 26eb9aaf. Their
licence is Creative Commons Attribution-ShareAlike 4.0 (CC BY-SA 4.0,
https://creativecommons.org/licenses/by-sa/4.0/). The audio written here is an adaptation and carries the same licence.

An utterance is 3 to 7 recordings of one speaker with pauses of 20 to 250 ms, each recording brought to the same speech
level, over a noise floor of -75 dBFS. No recording is in two of train (takes 10 to 49), dev (5 to 9) and test (0 to 4,
the official test part of FSDD). Noise is white, or babble: eight talkers other than the speaker, from training
recordings played backwards. The SNR is that of the speech without its pauses. What is written, as OUT/NAME.jsonl and
OUT/NAME/wav/*.flac (8 kHz, 16 bit):

    train                     6000 utterances, 5.0 h, clean
    dev_C                     300 utterances, 0.25 h; C is clean, babble_0, babble_5, white_0 or white_5 (0 and 5 dB)
    test_C                    600 utterances, 0.5 h
    train_no_lucas            6000 utterances, 4.8 h, clean: all but one speaker, to be tested on
    test_only_lucas_C         300 utterances, 0.3 h: every take of that speaker

and as manifests alone, of audio that those have:

    dev                       to select a model by: every speaker in turn in babble_0, babble_5, white_0 and white_5
    dev_no_lucas_C            dev_C without that speaker (whose training takes do talk in its babble)
    dev_no_lucas              to select by, as dev; k counts what is left

The same recordings and seed give the same samples, whichever sets are asked for; the random draws are those of Python's
`random` (compositions) and NumPy's PCG64 (noise). A manifest comes last: a set whose manifest is there is complete, and
another run skips it. OUT/digits.json says what the sets were made from, and sets made otherwise are not mixed with
them. All faults of the recordings are reported, a line each, before anything is written, and then the
exit status is 2.
"""

import argparse
import functools
import hashlib
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from mpq.errors import MpqError
from mpq.files import read_json, read_text, write_json, write_text

FORMAT = "mpq.digits/1"
VERSION = 1  # of the samples: another number wherever they would differ
FSDD_SHA256 = "6f643a7422de89763625dfc9aa79427e69f7a690223a5bc5752a2f56db5af465"  # of commit 26eb9aaf

RATE = 8000  # Hz
FRAME = RATE // 50  # samples in 20 ms
FADE = RATE // 200  # samples in 5 ms
SPEECH_DB = -26.0  # dBFS
FLOOR_DB = -75.0
TALKERS = 8  # in babble
NOISE_SEED = 0
TINY = 1e-12  # keeps silence from being divided by 0
PEAK = 0.99  # what is louder is turned down to it

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
UNSEEN = "lucas"
SEEN = tuple(speaker for speaker in SPEAKERS if speaker != UNSEEN)
TAKES = range(50)
TEST_TAKES, DEV_TAKES, TRAIN_TAKES = TAKES[:5], TAKES[5:10], TAKES[10:]


@dataclass(frozen=True)
class Part:
    """How many utterances are composed, of whose recordings; the name under which it stands seeds the draws."""

    utterances: int
    speakers: tuple[str, ...]
    takes: range


@dataclass(frozen=True)
class Noise:
    """What is mixed with the speech: "white" or "babble", at which signal-to-noise ratio."""

    kind: str
    snr_db: float


PARTS = {
    "train": Part(6000, SPEAKERS, TRAIN_TAKES),
    "dev": Part(300, SPEAKERS, DEV_TAKES),
    "test": Part(600, SPEAKERS, TEST_TAKES),
    f"train_no_{UNSEEN}": Part(6000, SEEN, TRAIN_TAKES),
    f"test_only_{UNSEEN}": Part(300, (UNSEEN,), TAKES),
}
NOISES = {f"{kind}_{snr}": Noise(kind, snr) for kind in ("babble", "white") for snr in (0, 5)}
CONDITIONS: dict[str, Noise | None] = {"clean": None, **NOISES}
RENDERED = {  # set -> part, condition
    **{name: (name, "clean") for name in ("train", f"train_no_{UNSEEN}")},
    **{f"{part}_{c}": (part, c) for part in ("dev", "test", f"test_only_{UNSEEN}") for c in CONDITIONS},
}
MIXED = tuple(f"dev_{c}" for c in NOISES)
VIEWS = {  # set -> the sets that it takes its utterances from in turn, speakers
    "dev": (MIXED, SPEAKERS),
    f"dev_no_{UNSEEN}": (MIXED, SEEN),
    **{f"dev_no_{UNSEEN}_{c}": ((f"dev_{c}",), SEEN) for c in CONDITIONS},
}
SETS = (*RENDERED, *VIEWS)


# Compositions


@dataclass(frozen=True)
class Utterance:
    """An utterance: recordings in a row.

    Attributes:
        utt_id: Name of the utterance; together with the noise it decides every sample.
        speaker: The speaker of all its recordings.
        recordings: Names of the recordings, without a suffix.
        pauses_seconds: Pauses before each recording, and after the last: one more than recordings.
    """

    utt_id: str
    speaker: str
    recordings: tuple[str, ...]
    pauses_seconds: tuple[float, ...]

    @property
    def text(self) -> str:
        return " ".join(WORDS[int(name.partition("_")[0])] for name in self.recordings)


def recording_names(speakers: Sequence[str], takes: range) -> list[str]:
    return [f"{digit}_{speaker}_{take}" for speaker in speakers for digit in range(10) for take in takes]


def deal(draws: random.Random, names: list[str]) -> Iterator[str]:
    """Yields names without end, each of them once before any comes again."""
    while True:
        yield from reversed(draws.sample(names, len(names)))


def compose(name: str, seed: int) -> Iterator[Utterance]:
    """Yields the utterances of a part, the speakers in turn, their recordings as evenly used as can be."""
    part = PARTS[name]
    draws = random.Random(f"{seed}/{name}")
    decks = {speaker: deal(draws, recording_names([speaker], part.takes)) for speaker in part.speakers}
    for k in range(part.utterances):
        speaker = part.speakers[k % len(part.speakers)]
        recordings = tuple(itertools.islice(decks[speaker], draws.randint(3, 7)))
        pauses = tuple(round(draws.uniform(0.02, 0.25), 3) for _ in range(len(recordings) + 1))
        yield Utterance(f"{name}_{speaker}_{k:05d}", speaker, recordings, pauses)


# Recordings


def read_recordings(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """Returns the recordings as `levelled` makes them, by name, and the SHA-256 of their samples.

    The checksum is of the 16-bit samples, little-endian, in the order of the names: the same for WAV and FLAC.

    Raises:
        MpqError: Recordings are missing, unknown, there twice, unreadable, or not 8 kHz, mono, 16 bit and 20 ms long;
            every fault is in the one error.
    """
    if not folder.is_dir():
        raise MpqError(f"{folder}: no such folder; expected the folder recordings of the Free Spoken Digit Dataset")
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise MpqError(f"{folder}: cannot be read: {error.strerror or error}") from error
    names = sorted(recording_names(SPEAKERS, TAKES))
    found: dict[str, list[Path]] = {name: [] for name in names}
    faults = []
    for path in paths:
        if path.suffix in (".wav", ".flac"):
            if path.stem in found:
                found[path.stem].append(path)
            else:
                faults.append(
                    f"{path}: none of the {len(names)} recordings {{digit}}_{{speaker}}_{{take}}; move it away"
                )
    if not any(found.values()):
        raise MpqError(f"{folder}: has no recording like 0_george_0.wav; expected FSDD's folder recordings")
    recordings, digest = {}, hashlib.sha256()
    for name in names:
        if len(found[name]) == 1:
            try:
                samples = read_samples(found[name][0])
            except MpqError as error:
                faults.append(str(error))
            else:
                digest.update(samples.tobytes())
                recordings[name] = levelled(samples)
        elif found[name]:
            faults.append(f"{folder / name}: there both as .wav and as .flac; remove one")
        else:
            faults.append(f"{folder / name}.wav: missing (and no .flac); get it from FSDD again")
    if faults:
        raise MpqError("\n".join(faults))
    return recordings, digest.hexdigest()


def read_samples(path: Path) -> np.ndarray:
    """Returns the (S,) 16-bit samples of a recording.

    Raises:
        MpqError: It cannot be read, or is not 8 kHz, mono, 16 bit and at least 20 ms long.
    """
    try:
        with soundfile.SoundFile(path) as file:
            samples = file.read(dtype="int16")
            form = f"{file.samplerate} Hz, {file.channels} channel(s), {file.subtype}"
    except (OSError, soundfile.SoundFileError) as error:
        reason = getattr(error, "error_string", error)  # without the path, which comes first here
        raise MpqError(f"{path}: cannot be read: {reason}; get it from FSDD again") from error
    expected = f"{RATE} Hz, 1 channel(s), PCM_16"
    if form != expected:
        raise MpqError(f"{path}: expected {expected}, got {form}; get it from FSDD again")
    if len(samples) < FRAME:
        raise MpqError(f"{path}: expected at least {FRAME} samples, got {len(samples)}; get it from FSDD again")
    return samples.astype("<i2", copy=False)


def levelled(samples: np.ndarray) -> np.ndarray:
    """Returns (S,) 16-bit samples as numbers without a mean, at the speech level, faded in and out.

    The level is that of the louder half of the 20 ms frames, so that silence around the word does not count.
    """
    wave = samples / 2**15
    wave = wave - wave.mean()
    energies = np.sort(np.square(wave[: len(wave) // FRAME * FRAME]).reshape(-1, FRAME).mean(axis=1))
    wave = wave * (amplitude(SPEECH_DB) / (np.sqrt(energies[len(energies) // 2 :].mean()) + TINY))
    fade = np.minimum(1.0, np.arange(1, len(wave) + 1) / FADE)
    return wave * fade * fade[::-1]


# Rendering


def amplitude(decibels: float) -> float:
    return 10.0 ** (decibels / 20.0)


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave))) + TINY)


def render(utterance: Utterance, noise: Noise | None, recordings: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the (S,) samples of an utterance, 8 kHz, below 1 in magnitude.

    Args:
        utterance: What is said.
        noise: None is clean.
        recordings: As `read_recordings` returns them.
    """
    key = hashlib.sha256(f"{NOISE_SEED}/{utterance.utt_id}".encode()).digest()
    draws = np.random.default_rng(int.from_bytes(key[:8], "little"))
    words = [recordings[name] for name in utterance.recordings]
    pauses = [np.zeros(round(seconds * RATE)) for seconds in utterance.pauses_seconds]
    pairs = zip(pauses, words, strict=False)  # the last pause has no word after it
    wave = np.concatenate([piece for pair in pairs for piece in pair] + pauses[-1:])
    wave += draws.standard_normal(len(wave)) * amplitude(FLOOR_DB)
    if noise:
        if noise.kind == "white":
            added = draws.standard_normal(len(wave))
        else:
            added = babble(len(wave), draws, utterance.speaker, recordings)
        wave += added * (rms(np.concatenate(words)) / rms(added) / amplitude(noise.snr_db))
    return wave * min(1.0, PEAK / np.abs(wave).max())


def babble(count: int, draws: np.random.Generator, speaker: str, recordings: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns (count,) samples of talkers other than the speaker, backwards, each with pauses of up to 0.2 s."""
    pool = talker_pool(speaker)
    total = np.zeros(count)
    for _ in range(TALKERS):
        start = -int(draws.integers(0, RATE // 2))  # they have begun before the utterance does
        while start < count:
            word = recordings[pool[int(draws.integers(len(pool)))]][::-1]
            first, end = max(start, 0), min(start + len(word), count)
            if end > first:
                total[first:end] += word[first - start : end - start]
            start += len(word) + int(draws.integers(0, RATE // 5))
    return total


@functools.cache
def talker_pool(speaker: str) -> list[str]:
    return sorted(recording_names([other for other in SPEAKERS if other != speaker], TRAIN_TAKES))


# Sets


def write_rendered(out: Path, name: str, seed: int, recordings: Mapping[str, np.ndarray]) -> list[dict[str, object]]:
    """Writes the audio of a set; returns the records of its manifest.

    Raises:
        MpqError: The folder cannot be written to.
    """
    part, condition = RENDERED[name]
    folder, rows = out / name / "wav", []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for utterance in compose(part, seed):
            wave = render(utterance, CONDITIONS[condition], recordings)
            path = folder / f"{utterance.utt_id}.flac"
            soundfile.write(path, wave.astype(np.float32), RATE, subtype="PCM_16")
            rows.append(
                {
                    "audio_filepath": path.relative_to(out).as_posix(),
                    "text": utterance.text,
                    "duration": len(wave) / RATE,
                    "speaker": utterance.speaker,
                    "utt_id": utterance.utt_id,
                }
            )
    except (OSError, soundfile.SoundFileError) as error:
        raise MpqError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return rows


def view_rows(out: Path, name: str) -> list[dict[str, object]]:
    """Returns the records of a set that has no audio of its own, from the manifests of those that do."""
    sources, speakers = VIEWS[name]
    tables = []
    for source in sources:
        rows = [json.loads(line) for line in read_text(out / f"{source}.jsonl").splitlines()]
        tables.append([row for row in rows if row["speaker"] in speakers])
    turns = 2 * len(SPEAKERS)  # after two rounds of the speakers the noises move on, so that each speaker meets each
    return [tables[(k + k // turns) % len(tables)][k] for k in range(len(tables[0]))]


def claim(out: Path, made_from: dict[str, object]) -> None:
    """Writes OUT/digits.json, or checks that it says the same.

    Raises:
        MpqError: What is in `out` was made from something else or by something else, or `out` cannot be written.
    """
    path = out / "digits.json"
    if path.exists():
        before = read_json(path, FORMAT)
        for key, value in made_from.items():
            if before.get(key) != value:
                raise MpqError(
                    f'{path}: "{key}": the sets there were made with {before.get(key)}, not {value}; '
                    "choose another folder, or remove this one"
                )
        return
    foreign = [name for name in SETS if (out / f"{name}.jsonl").exists()]
    if foreign:
        raise MpqError(f"{out / foreign[0]}.jsonl: is there, but no digits.json beside it; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MpqError(f"{out}: cannot be written: {error.strerror or error}") from error
    write_json(path, made_from)


def prepare(folder: Path, out: Path, sets: Sequence[str], seed: int) -> None:
    """Writes the sets that are not there yet, and those that they take their utterances from.

    Raises:
        MpqError: Anything is wrong with the recordings, or with `out`.
    """
    recordings, digest = read_recordings(folder)
    hours = sum(len(wave) for wave in recordings.values()) / RATE / 3600
    print(f"{folder}: {len(recordings)} recordings, {hours:.2f} h", file=sys.stderr)
    if digest != FSDD_SHA256:
        print(
            f"{folder}: note: the samples are not those of FSDD's commit 26eb9aaf; so will be the results",
            file=sys.stderr,
        )
    claim(out, {"format": FORMAT, "version": VERSION, "seed": seed, "recordings_sha256": digest})
    needed = {source for name in sets if name in VIEWS for source in VIEWS[name][0]} | set(sets)
    for name in SETS:
        manifest = out / f"{name}.jsonl"
        if name not in needed:
            continue
        if manifest.exists():
            print(f"{manifest}: done before", file=sys.stderr)
            continue
        start = time.monotonic()
        if name in RENDERED:
            print(f"{name}: {PARTS[RENDERED[name][0]].utterances} utterances to render", file=sys.stderr)
            rows = write_rendered(out, name, seed, recordings)
        else:
            rows = view_rows(out, name)
        write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
        speakers, hours = len({row["speaker"] for row in rows}), sum(row["duration"] for row in rows) / 3600
        seconds = time.monotonic() - start
        print(
            f"{manifest}: {len(rows)} utterances, {speakers} speakers, {hours:.2f} h ({seconds:.1f} s)", file=sys.stderr
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make connected digits in noise of the Free Spoken Digit Dataset.")
    parser.add_argument("recordings", metavar="RECORDINGS", type=Path, help="FSDD's folder recordings")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the manifests and the audio")
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=SETS,
        metavar="NAME",
        help=f"sets, of {', '.join(SETS)}; default: all",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=20, help="seed of the compositions (default: 20)")
    options = parser.parse_args(argv)
    try:
        prepare(options.recordings, options.out, options.sets, options.seed)
    except MpqError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
