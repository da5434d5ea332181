"""Manifests of Switchboard-1 (training, development) and of Hub5'00 (test), from the LDC's folders.

    python recipes/swbd/prepare.py data/swbd \\
        --swbd /path/LDC97S62 --ms98 /path/swb_ms98_transcriptions \\
        --hub5-audio /path/LDC2002S09 --hub5-text /path/LDC2002T43

Either pair of options may be left out. OUT gets train.jsonl and dev.jsonl, hub5e_00_swbd.jsonl and
hub5e_00_callhm.jsonl, and the audio that they name: a line of a manifest cannot choose a channel, so each side of a
conversation becomes a mono FLAC file of its own, OUT/wav/sw02001-A.flac (8 kHz, 16 bit; nothing is lost), and
utterances are given by their offset and duration in it. A side that is there already and as long as its conversation
is kept, so that a run that was cut off goes on, and a second run writes the same bytes.

Texts follow the recipe of Kaldi and ESPnet (egs/swbd, egs2/swbd), `ms98_words` and `stm_words` say how. A speaker is a
side of a conversation, as there. All faults of transcripts and audio headers are reported, a line each, before anything
is written; damage inside audio is reported after all of it was read, and then no manifest is written. The exit status
is 2.
"""

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from mpq.errors import MpqError
from mpq.files import atomic_path, read_text, write_text
from mpq.speech.audio import TOLERANCE_SECONDS, probe_audio

RATE = 8000  # Hz
SIDES = "AB"  # of channel 1 and 2
HUB5_STM = "hub5e00.english.000405.stm"
NOT_WORDS = {"[silence]", "[noise]", "[laughter]", "[vocalized-noise]", "<b_aside>", "<e_aside>"}
LETTERS = {  # the names of the letters in the phones of the MS98 dictionary
    "a": "ey", "b": "b iy", "c": "s iy", "d": "d iy", "e": "iy", "f": "eh f", "g": "jh iy", "h": "ey ch", "i": "ay",
    "j": "jh ey", "k": "k ey", "l": "eh l", "m": "eh m", "n": "eh n", "o": "ow", "p": "p iy", "q": "k y uw",
    "r": "aa r", "s": "eh s", "t": "t iy", "u": "y uw", "v": "v iy", "w": "d ah b ax l y uw", "x": "eh k s",
    "y": "w ay", "z": "z iy",
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """An utterance.

    Attributes:
        recording: The conversation, such as "sw02001" or "en_4156".
        side: "A" or "B".
        start, end: Seconds.
        text: The text in the manifest.
        source: The line that it comes from, "FILE:LINE".
    """

    recording: str
    side: str
    start: float
    end: float
    text: str
    source: str

    @property
    def utt_id(self) -> str:
        """The name that Kaldi gives it: side and times in hundredths of a second, such as sw02001-A_000098-001156."""
        start, end = (int(100 * seconds + 0.5) for seconds in (self.start, self.end))
        return f"{self.recording}-{self.side}_{start:06d}-{end:06d}"


def ms98_words(text: str, acronyms: dict[str, str]) -> str:
    """Returns the words of a line of the MS98 transcriptions, in lower case.

    Noises, laughter and the marks of asides are dropped (Kaldi gives noise and laughter phones of their own). Of
    [laughter-word] the word stays, of [said/meant] what was said, of a partial word th[at]- what was heard, with a
    hyphen for the rest: th-. Braces around coinages and the suffix _1 go. Acronyms are spelled, as in the references
    of Hub5'00: IBM is i b m, AT&T is a t and t.
    """
    return " ".join(" ".join(_ms98_token(token, acronyms) for token in text.split()).split())


def _ms98_token(token: str, acronyms: dict[str, str]) -> str:
    if token.lower() in NOT_WORDS:
        return ""
    token = re.sub(r"^-?\[laughter-(.+)\](-?)$", r"\1\2", token, flags=re.IGNORECASE)
    token = re.sub(r"^\[(.+)/.+\](-?)$", r"\1\2", token)  # [lem[guini]-/linguini] -> lem[guini]-
    token = re.sub(r"^-?\[[^][]+\](.+)$", r"-\1", token)  # -[an]y -> -y
    token = re.sub(r"^(.+)\[[^][]+\]-?$", r"\1-", token)  # th[at]- -> th-
    token = re.sub(r"\[[^][]*\]", "-", token)  # ammu[n]it- -> ammu-it-
    token = re.sub(r"_\d+$", "", re.sub(r"^\{(.+)\}$", r"\1", token))
    token = acronyms.get(token, token).lower()
    if re.fullmatch(r"[a-z]{1,2}&[a-z]{1,2}", token):  # letters on both sides of an ampersand are read as letters
        token = " ".join(token)
    token = re.sub(r"[][{}.]", "", token.replace("&", " and ").replace("._", " "))
    return token if re.search(r"\w", token) else ""


def read_acronyms(dictionary: Path) -> dict[str, str]:
    """Returns word -> spelled word, for the words of a dictionary that are pronounced as their letters only.

    The ending of a plural or possessive is joined on: CDs is "c ds", IBM's is "i b m's", as in ESPnet. Unlike there, a
    word that is also pronounced in another way stays a word.

    Args:
        dictionary: sw-ms98-dict.text, lines of WORD PHONES; # starts a comment.
    """
    pronunciations: dict[str, set[str]] = {}
    for line in read_text(dictionary).splitlines():
        word, *phones = line.split() or ["#"]
        if not word.startswith("#") and phones:
            pronunciations.setdefault(word, set()).add(" ".join(phones))
    acronyms = {}
    for word, spoken in pronunciations.items():
        for stem, ending in ((word, ""), (word.removesuffix("'s"), "'s"), (word.removesuffix("s"), "s")):
            letters = stem.lower()
            if stem + ending != word or len(letters) < 2 or not set(letters) <= set(LETTERS):
                continue
            name = " ".join(LETTERS[letter] for letter in letters)
            if spoken <= ({f"{name} s", f"{name} z"} if ending else {name}):
                acronyms[word] = " ".join(letters) + ending
    return acronyms


def stm_words(text: str) -> str:
    """Returns the words of a line of the Hub5'00 reference, in lower case.

    Hesitations, (%hesitation), and the marks of asides are dropped; words in parentheses, which the official scoring
    lets a system leave out, stay as words; of alternatives { a / b } the first stays.
    """
    text = re.sub(r"<[^<>]*>", " ", text.lower())
    text = re.sub(r"\{([^/{}]*)/[^{}]*\}", r" \1 ", text)
    tokens = re.sub(r"[(){}]", " ", text).split()
    return " ".join(token for token in tokens if not token.startswith("%") and token != "@")


def read_ms98(folder: Path, faults: list[str]) -> tuple[list[Segment], int]:
    """Returns the utterances of the MS98 transcriptions that have words, by utt_id, and how many have none."""
    paths = sorted(folder.rglob("sw*-ms98-a-trans.text"))
    if not paths:
        raise MpqError(f"{folder}: has no sw*-ms98-a-trans.text; expected the folder swb_ms98_transcriptions")
    dictionaries = sorted(folder.rglob("sw-ms98-dict.text"))
    if not dictionaries:
        print(f"{folder}: has no sw-ms98-dict.text; acronyms are not spelled (IBM stays ibm)", file=sys.stderr)
    acronyms = read_acronyms(dictionaries[0]) if dictionaries else {}
    segments, empty = [], 0
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            match = re.fullmatch(r"sw(\d{4})([AB])-ms98-a-\d+\s+(\S+)\s+(\S+)\s*(.*)", line.strip())
            segment = match and _segment(
                f"sw0{match[1]}", match[2], match[3], match[4], ms98_words(match[5], acronyms), source
            )
            if not segment:
                faults.append(f"{source}: expected swNNNNA-ms98-a-NNNN START END WORDS, got {line[:80]!r}")
            elif segment.text:
                segments.append(segment)
            else:
                empty += 1
    return sorted(segments, key=lambda segment: segment.utt_id), empty


def read_stm(path: Path, faults: list[str]) -> tuple[list[Segment], int, int]:
    """Returns the utterances of a reference, how many of its lines are not scored, and how many have no words."""
    segments, ignored, empty = [], 0, 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        source = f"{path}:{number}"
        if not line.strip() or line.startswith(";;"):
            continue
        if "ignore_time_segment_in_scoring" in line.lower():
            ignored += 1
            continue
        match = re.fullmatch(
            r"((?:en|sw)_\d+)\s+([AB12])\s+\S+\s+([\d.]+)\s+([\d.]+)(?:\s+<\S*>)?(?:\s+(.*))?", line.strip()
        )
        side = match and {"1": "A", "2": "B"}.get(match[2], match[2])
        segment = match and _segment(match[1], side, match[3], match[4], stm_words(match[5] or ""), source)
        if not segment:
            faults.append(f"{source}: expected RECORDING A|B SPEAKER START END <LABEL> WORDS, got {line[:80]!r}")
        elif segment.text:
            segments.append(segment)
        else:
            empty += 1
    return segments, ignored, empty


def _segment(recording: str, side: str, start: str, end: str, text: str, source: str) -> Segment | None:
    """Returns an utterance; None unless the times are numbers and the end is after the start."""
    try:
        segment = Segment(recording, side, float(start), float(end), text, source)
    except ValueError:
        return None
    return segment if 0 <= segment.start < segment.end < float("inf") else None


def find_recordings(folder: Path, pattern: str, name: str, faults: list[str]) -> dict[str, Path]:
    """Returns recording -> its SPH file, of the files anywhere in a folder whose stem matches.

    Args:
        folder: The corpus's folder.
        pattern: Regular expression of the stem, with one group.
        name: What a recording is called, with {} for the group.
        faults: The list to which recordings that are there twice are added.
    """
    recordings: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".sph"):
        if match := re.fullmatch(pattern, path.stem, re.IGNORECASE):
            recording = name.format(match[1].lower())
            if recording in recordings:
                faults.append(f"{path}: {recordings[recording]} is the same conversation; keep one")
            recordings.setdefault(recording, path)
    if not recordings:
        raise MpqError(f"{folder}: has no SPH files of conversations ({pattern}.sph)")
    return recordings


def header_fault(path: Path) -> str | None:
    """Returns what keeps a conversation's SPH file from being read; None if its header is as it should be."""
    try:
        with open(path, "rb") as file:
            header = file.read(1024)
        if coding := re.search(rb"sample_coding -s\d+ (\S*shorten\S*)", header):
            return (
                f"{path}: its samples are compressed ({coding[1].decode('ascii', 'replace')}), which libsndfile does "
                "not read; expand it with the LDC's sph2pipe (sph2pipe -f sph OLD.sph NEW.sph) and put it in its place"
            )
        info = soundfile.info(path)
    except (OSError, soundfile.SoundFileError) as error:
        return f"{path}: cannot be read: {error}; copy it again"
    if (info.channels, info.samplerate) != (2, RATE):
        return f"{path}: expected 2 channels at {RATE} Hz, got {info.channels} at {info.samplerate} Hz; copy it again"
    return None


def write_sides(path: Path, recording: str, folder: Path) -> float:
    """Writes the sides of a conversation as FLAC files, unless they are there; returns its duration, seconds.

    Raises:
        MpqError: The conversation is cut short or damaged, or a file cannot be written.
    """
    outputs = [folder / f"{recording}-{side}.flac" for side in SIDES]
    frames = probe_audio(path).frames
    if not all(output.exists() and soundfile.info(output).frames == frames for output in outputs):
        samples, _ = soundfile.read(path, dtype="int16")  # (S, 2); 8-bit mu-law becomes 14 of the 16 bits
        for channel, output in enumerate(outputs):
            with atomic_path(output) as temporary:
                soundfile.write(temporary, samples[:, channel], RATE, format="FLAC", subtype="PCM_16")
    return frames / RATE


def write_all_sides(recordings: dict[str, Path], folder: Path) -> dict[str, float]:
    """Writes the sides of all conversations; returns their durations, seconds.

    Raises:
        MpqError: Some are damaged (each is a line).
    """
    durations, faults = {}, []
    for done, (recording, path) in enumerate(sorted(recordings.items()), 1):
        try:
            durations[recording] = write_sides(path, recording, folder)
        except MpqError as error:
            faults.append(str(error))
        if done % 100 == 0 or done == len(recordings):
            print(f"{folder}: {done} of {len(recordings)} conversations", file=sys.stderr)
    if faults:
        raise MpqError("\n".join(faults))
    return durations


def split_dev(segments: Sequence[Segment], dev_utterances: int) -> tuple[list[Segment], list[Segment]]:
    """Returns train and dev: dev is the first conversations that together have `dev_utterances` or more.

    ESPnet takes the first 4000 utterances, which cuts through a conversation; whole ones keep both its sides together.
    """
    dev: list[Segment] = []
    conversations = itertools.groupby(segments, key=lambda segment: segment.recording)
    for _, utterances in conversations:
        if len(dev) >= dev_utterances:
            return [*utterances, *(s for _, later in conversations for s in later)], dev
        dev += utterances
    return [], dev


def at_most(segments: Sequence[Segment], count: int) -> list[Segment]:
    """Returns the utterances without those whose text `count` earlier ones have (there are thousands of "uh-huh")."""
    seen: Counter[str] = Counter()
    kept = []
    for segment in segments:
        seen[segment.text] += 1
        if seen[segment.text] <= count:
            kept.append(segment)
    return kept


def write_manifest(path: Path, segments: Sequence[Segment]) -> None:
    """Writes a manifest and says on stdout what is in it."""
    rows = [
        {
            "audio_filepath": f"wav/{segment.recording}-{segment.side}.flac",
            "offset": segment.start,
            "duration": round(segment.end - segment.start, 6),
            "text": segment.text,
            "speaker": f"{segment.recording}-{segment.side}",
            "utt_id": segment.utt_id,
        }
        for segment in segments
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sides, hours = len({row["speaker"] for row in rows}), sum(row["duration"] for row in rows) / 3600
    print(f"{path}: {len(rows)} utterances, {sides} sides, {hours:.2f} h")


def read_training(options: argparse.Namespace, faults: list[str]) -> tuple[list[Segment], dict[str, Path]]:
    """Returns the utterances of Switchboard-1 and the SPH files that they need."""
    recordings = find_recordings(options.swbd, r"sw0?(\d{4})", "sw0{}", faults)
    segments, empty = read_ms98(options.ms98, faults)
    print(f"{options.ms98}: {len(segments)} utterances; {empty} without words are left out", file=sys.stderr)
    if options.skip_missing:
        missing = {segment.recording for segment in segments} - recordings.keys()
        segments = [segment for segment in segments if segment.recording in recordings]
        print(f"{options.swbd}: {len(missing)} conversations without audio are left out", file=sys.stderr)
    needed = _needed(segments, recordings, options.swbd, "add it, or leave it out with --skip-missing", faults)
    if unused := len(recordings) - len(needed):
        print(f"{options.swbd}: {unused} conversations without a transcript are left out", file=sys.stderr)
    return segments, needed


def read_test(options: argparse.Namespace, faults: list[str]) -> tuple[list[Segment], dict[str, Path]]:
    """Returns the utterances of Hub5'00 and the SPH files that they need."""
    recordings = find_recordings(options.hub5_audio, r"((?:en|sw)_\d+)", "{}", faults)
    stms = sorted(options.hub5_text.rglob(HUB5_STM))
    if not stms:
        raise MpqError(f"{options.hub5_text}: has no {HUB5_STM}; expected the folder of LDC2002T43")
    segments, ignored, empty = read_stm(stms[0], faults)
    print(
        f"{stms[0]}: {len(segments)} utterances; {ignored} that are not scored and {empty} without words are left out",
        file=sys.stderr,
    )
    return segments, _needed(segments, recordings, options.hub5_audio, "copy it again", faults)


def _needed(
    segments: Sequence[Segment], recordings: dict[str, Path], folder: Path, remedy: str, faults: list[str]
) -> dict[str, Path]:
    """Returns the recordings that have utterances; a conversation without audio goes to `faults`."""
    first = {segment.recording: segment.source for segment in reversed(segments)}
    faults += [
        f"{source}: {recording} has no audio in {folder}; {remedy}"
        for recording, source in sorted(first.items())
        if recording not in recordings
    ]
    return {recording: path for recording, path in recordings.items() if recording in first}


def _beyond(segment: Segment, durations: dict[str, float]) -> bool:
    seconds = durations[segment.recording]
    return segment.start >= seconds or segment.end > seconds + TOLERANCE_SECONDS


def prepare(options: argparse.Namespace) -> None:
    """Does what the module's docstring says.

    Raises:
        MpqError: Options are missing, or anything is wrong with the data (every fault is in the one error).
    """
    if not (options.swbd or options.hub5_audio):
        raise MpqError("give --swbd with --ms98, or --hub5-audio with --hub5-text, or both pairs")
    if bool(options.swbd) != bool(options.ms98) or bool(options.hub5_audio) != bool(options.hub5_text):
        raise MpqError("--swbd goes with --ms98, and --hub5-audio with --hub5-text; give both or none")
    faults: list[str] = []
    train, audio = read_training(options, faults) if options.swbd else ([], {})
    test, test_audio = read_test(options, faults) if options.hub5_audio else ([], {})
    audio |= test_audio
    sources: dict[str, str] = {}
    for segment in [*train, *test]:
        if segment.utt_id in sources:
            faults.append(f"{segment.source}: {segment.utt_id} is already at {sources[segment.utt_id]}; remove one")
        sources.setdefault(segment.utt_id, segment.source)
    faults += [fault for path in audio.values() if (fault := header_fault(path))]
    if faults:
        raise MpqError("\n".join(faults))

    try:
        (options.out / "wav").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MpqError(f"{options.out}: cannot be written: {error.strerror or error}") from error
    durations = write_all_sides(audio, options.out / "wav")
    for segment in test:
        if _beyond(segment, durations):
            faults.append(
                f"{segment.source}: ends after its audio, {durations[segment.recording]:.2f} s; copy it again"
            )
    if faults:
        raise MpqError("\n".join(faults))
    if options.swbd:
        inside = [segment for segment in train if not _beyond(segment, durations)]
        kept, dev = split_dev(inside, options.dev_utterances)
        limited = at_most(kept, options.max_same_text)
        print(
            f"{options.swbd}: {len(train) - len(inside)} utterances that end after their audio are left out, and of "
            f"train {len(kept) - len(limited)} whose text {options.max_same_text} others have",
            file=sys.stderr,
        )
        if not limited:
            raise MpqError(
                f"{options.swbd}: no conversation is left for train; expected more than {options.dev_utterances} "
                "utterances, lower --dev-utterances"
            )
        write_manifest(options.out / "train.jsonl", limited)
        write_manifest(options.out / "dev.jsonl", dev)
    if options.hub5_audio:
        for name, prefix in (("hub5e_00_swbd", "sw_"), ("hub5e_00_callhm", "en_")):
            write_manifest(options.out / f"{name}.jsonl", [s for s in test if s.recording.startswith(prefix)])


def positive(text: str) -> int:
    """Returns a whole number of at least 1, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write mpq's manifests and mono audio of Switchboard-1 and Hub5'00.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the manifests and the audio")
    parser.add_argument("--swbd", metavar="DIR", type=Path, help="LDC97S62: sw0NNNN.sph anywhere in it")
    parser.add_argument("--ms98", metavar="DIR", type=Path, help="swb_ms98_transcriptions")
    parser.add_argument("--hub5-audio", metavar="DIR", type=Path, help="LDC2002S09: {en,sw}_NNNN.sph anywhere in it")
    parser.add_argument("--hub5-text", metavar="DIR", type=Path, help=f"LDC2002T43: {HUB5_STM} anywhere in it")
    parser.add_argument(
        "--dev-utterances", metavar="N", type=positive, default=4000, help="least in dev (default: 4000)"
    )
    parser.add_argument(
        "--max-same-text",
        metavar="N",
        type=positive,
        default=300,
        help="most of a text (default: 300)",
    )
    parser.add_argument("--skip-missing", action="store_true", help="leave out training conversations without audio")
    try:
        prepare(parser.parse_args(argv))
    except MpqError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
