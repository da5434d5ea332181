"""Manifests: lists of utterances and their transcripts.

They are JSON lines in NeMo's shape, or Kaldi or ESPnet data directories of plain paths. Relative audio paths are
relative to the folder of the file that names them, `wav.scp` included (unlike Kaldi, where they are relative to
wherever the command is started). All lines are looked at, and all faults are reported together, each as
"FILE:LINE: what is wrong and what to do". What NeMo means by a key is what it means here: a duration of 0 is unknown, a
missing offset is 0.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from mpq.errors import MpqError
from mpq.faults import JsonObject, by_place, fault, named, shown
from mpq.files import check_input, foreign_content
from mpq.speech.trn import fold

_SHOWN_FAULTS = 20
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Utterance:
    """One utterance of a manifest.

    Attributes:
        utt_id: Unique in its manifest, without whitespace and parentheses, so that it can stand in a trn file.
        audio_path: The audio file.
        text: The transcript; "" is one of no words, None is none.
        duration: Seconds, as the manifest says, and how much of the file to read; None is up to its end.
        offset: Seconds from the start of the file; None is 0.
        speaker: The speaker.
        source: The file and line that it was read from, such as "dev.jsonl:12".
        channel: The channel that this utterance is heard on, "mix" or a number from "0"; None leaves it to the caller.
        others: The other keys of its line whose values are text, numbers or true or false, as (key, text); results can
            be told apart by them (`mpq compare --by`).
    """

    utt_id: str
    audio_path: Path
    text: str | None
    duration: float | None
    offset: float | None
    speaker: str | None
    source: str
    channel: str | None = None
    others: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Fault:
    """Why an utterance cannot be used.

    Attributes:
        source: Where it was read, such as "dev.jsonl:12".
        kind: What is wrong in a few words, by which faults are counted.
        words: What is wrong with it, and what to do.
    """

    source: str
    kind: str
    words: str

    def __str__(self) -> str:
        return f"{self.source}: {self.words}"


@dataclass(frozen=True)
class Manifest:
    """What was read of a manifest or a Kaldi data directory.

    Attributes:
        utterances: Those of the good lines, in their order.
        faults: What is wrong with the other lines.
        notes: What the user should know of that is no fault, a line each.
    """

    utterances: tuple[Utterance, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


def read_data(path: Path, skip_bad: bool = False) -> list[Utterance]:
    """Returns the utterances of `read_manifest`.

    Args:
        path: The manifest or directory.
        skip_bad: Leave faulty lines out.

    Raises:
        MpqError: As `read_manifest`, or a line is faulty that may not be left out. All faults are in the one error.
    """
    manifest = read_manifest(path)
    if manifest.faults and not (skip_bad and manifest.utterances):
        raise MpqError(list_faults(list(map(str, manifest.faults))))
    return list(manifest.utterances)


def read_manifest(path: Path) -> Manifest:
    """Returns what is in a JSON-lines manifest or in a Kaldi data directory, in its order.

    Blank lines, a byte order mark and CRLF line ends are passed over. In a manifest
    "audio_filepath" is required; "utt_id" is by default the audio file's stem, with the offset if there is one, and
    with the line's number where that is taken. Keys that change nothing are named in a note; one that sounds as if it
    changed what is heard is a fault. A Kaldi directory has `wav.scp`, and may have `segments` (a line is then an
    utterance; an end of -1 is the file's), `text` and `utt2spk`.

    A fault is a line that is not as it should be, or an utt_id that is not unique or cannot stand in a trn file.

    Raises:
        MpqError: The path is neither, cannot be read, or has no utterance, not even a faulty one.
    """
    path = Path(path)
    faults: list[Fault] = []
    notes: list[str] = []
    if not path.exists():
        raise MpqError(f"{path}: no such file; expected a JSON-lines manifest or a Kaldi data directory")
    utterances: list[Utterance] = []
    seen: dict[str, str] = {}
    for utterance in _kaldi(path, faults, notes) if path.is_dir() else _manifest(path, faults, notes):
        if not utterance.utt_id or re.search(r"[\s()]", utterance.utt_id):
            words = f"expected no whitespace and no parentheses, got {json.dumps(utterance.utt_id)}; give another"
            faults.append(Fault(utterance.source, "utt_id", f"utt_id: {words}"))
        elif fold(utterance.utt_id) in seen:
            words = (
                f'utt_id "{utterance.utt_id}" is already that of {seen[fold(utterance.utt_id)]} '
                "(A-Z count as a-z, as in sclite); give each its own"
            )
            faults.append(Fault(utterance.source, "utt_id twice", words))
        else:
            seen[fold(utterance.utt_id)] = utterance.source
            utterances.append(utterance)
    if not (utterances or faults):
        raise MpqError(f"{path}: no utterances; expected at least one")
    return Manifest(tuple(utterances), tuple(faults), tuple(notes))


def list_faults(faults: Sequence[str]) -> str:
    """Returns the first faults, a line each, and how many more there are."""
    more = len(faults) - _SHOWN_FAULTS
    return "\n".join([*faults[:_SHOWN_FAULTS], *([f"and {more} more faults"] if more > 0 else [])])


def _lines(path: Path, faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """Yields ("FILE:LINE", line) for each line that is not blank."""
    check_input(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror or error}") from error
    if data and (what := foreign_content(data[:512])):
        raise MpqError(f"{path}: expected lines of text, got {what}")
    # not str.splitlines, which also splits at characters that may stand in a JSON string, such as U+2028
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            words = f"expected UTF-8 text, got byte {line[error.start]:#04x}"
            faults.append(Fault(f"{path}:{number}", "no UTF-8 text", words))
            continue
        if text:
            yield f"{path}:{number}", text


def _whole(text: str) -> str:
    if _NO_TEXT.search(text):
        raise PydanticCustomError("text", "text without NUL and half surrogate pairs")
    return text


_Text = Annotated[str, AfterValidator(_whole)]
_ChannelName = Annotated[str, Field(pattern="^(average|[0-9]+)$")]
_AUDIO_WORDS = frozenset("channel channels start begin onset end stop offset trim clip speed tempo gain volume".split())
"""Words in the keys of other tools by which they choose or change what is heard."""
_INFORMATION_WORDS = frozenset("num n count original orig total text char word".split())
"""Words in keys such as "num_channels", which only tell something."""


class _Line(JsonObject):
    """A line of a manifest."""

    audio_filepath: Annotated[str, Field(min_length=1), AfterValidator(_whole)]
    text: _Text | None = None
    duration: Annotated[float, Field(ge=0, lt=1e100)] | None = None
    offset: Annotated[float, Field(ge=0, lt=1e100)] | None = None
    speaker: _Text | int | None = None
    utt_id: _Text | None = None
    channel_selector: Annotated[int, Field(ge=0)] | _ChannelName | None = None

    @property
    def channel(self) -> str | None:
        if self.channel_selector is None:
            return None
        return "mix" if self.channel_selector == "average" else str(self.channel_selector)


def _changes_audio(key: str) -> bool:
    """Returns whether a key that is not read sounds as if it said which part of the audio is heard, or how."""
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", key).lower())
    return bool(_AUDIO_WORDS.intersection(words)) and not _INFORMATION_WORDS.intersection(words)


def _manifest(path: Path, faults: list[Fault], notes: list[str]) -> Iterator[Utterance]:
    """Yields the utterances of the manifest's good lines; the faults of the others go to `faults`."""
    used: set[str] = set()
    unread: dict[str, int] = {}
    for source, line in _lines(path, faults):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = f"expected a JSON object on one line: {getattr(error, 'msg', error)}"
            faults.append(Fault(source, "no JSON", words))
            continue
        if not isinstance(record, dict):
            faults.append(Fault(source, "no JSON object", f"expected a JSON object, got a {type(record).__name__}"))
            continue
        try:
            values = _Line.model_validate(record)
        except ValidationError as error:
            for place, found in by_place(error, record).items():
                faults.append(Fault(source, named(place), f"{named(place)}: {fault(found)}"))
            continue
        others = [key for key in record if key not in _Line.model_fields and record[key] is not None]
        if changing := [key for key in others if _changes_audio(key)]:
            words = (
                f"{', '.join(map(shown, changing))}: not read, but sounds as if it changed what is heard; say it "
                "with offset, duration and channel_selector, or remove it"
            )
            faults.append(Fault(source, "key that is not read", words))
            continue
        unread |= {key: unread.get(key, 0) + 1 for key in others}
        audio_path = path.parent / values.audio_filepath
        utt_id = values.utt_id
        if utt_id is None:
            utt_id = _default_id(audio_path, values.offset, source, used)
        used.add(fold(utt_id))
        speaker = None if values.speaker is None else str(values.speaker)
        duration = values.duration or None  # 0 is unknown, as in NeMo
        labels = tuple(
            (_label(key), _label(record[key])) for key in others if isinstance(record[key], str | int | float)
        )
        yield Utterance(
            utt_id, audio_path, values.text, duration, values.offset, speaker, source, values.channel, labels
        )
    if unread:
        notes.append(f"{path}: keys that only mpq compare --by reads: {', '.join(map(shown, sorted(unread)))}")


def _label(value: str | int | float) -> str:
    """Returns a value as text that can be written as UTF-8."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _default_id(audio_path: Path, offset: float | None, source: str, used: set[str]) -> str:
    """Returns the file's stem, with the offset if there is one, and with the line's number if that is taken."""
    utt_id = re.sub(r"[\s()]+", "_", audio_path.stem)
    if offset:
        utt_id += f"-{offset:g}"
    return f"{utt_id}-{source.rpartition(':')[2]}" if fold(utt_id) in used else utt_id


def _kaldi(folder: Path, faults: list[Fault], notes: list[str]) -> Iterator[Utterance]:
    """Yields the utterances of a Kaldi data directory's good lines; the faults of the others go to `faults`."""
    if not (folder / "wav.scp").is_file():
        raise MpqError(f"{folder}: has no wav.scp; expected a Kaldi data directory or a JSON-lines manifest")
    recordings = _table(folder / "wav.scp", faults)
    bad: set[str] = set()
    for name, (source, value) in recordings.items():
        words = ""
        if value.startswith("|") or value.endswith("|"):
            words = "a shell command, which mpq never runs; write its output to a file and name that"
        elif re.search(r"\.ark:\d+", value):
            words = "a place in a Kaldi archive; expected a plain audio file"
        elif not value or "\0" in value:
            words = "expected a recording and the path of its audio file"
        if words:
            faults.append(Fault(source, "recording", words))
            bad.add(name)
    texts, speakers = _table(folder / "text", faults), _table(folder / "utt2spk", faults)
    if (folder / "segments").exists():
        lines = _table(folder / "segments", faults)
        segments = _segments(lines, recordings, faults)
    else:
        lines = recordings
        segments = {key: _Segment(source, key) for key, (source, _) in recordings.items()}
    for utt_id, one in segments.items():
        if one.recording not in bad:
            path, text, speaker = recordings[one.recording][1], texts.get(utt_id), speakers.get(utt_id)
            yield Utterance(
                utt_id,
                folder / path,
                text and text[1],
                one.duration,
                one.offset,
                speaker and speaker[1],
                one.source,
                one.channel,
            )
        elif lines is not recordings:
            words = f'the recording "{one.recording}" cannot be read, see {recordings[one.recording][0]}'
            faults.append(Fault(one.source, "recording", words))
    for name, table in (("text", texts), ("utt2spk", speakers)):
        if extra := [utt_id for utt_id in table if utt_id not in lines]:
            shown_ids = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
            notes.append(
                f"{folder / name}: {len(extra)} of {len(table)} lines have no audio and are left out: {shown_ids}"
            )


def _table(path: Path, faults: list[Fault]) -> dict[str, tuple[str, str]]:
    """Returns a Kaldi table, key -> ("FILE:LINE", rest of the line); an empty one if there is no such file."""
    table: dict[str, tuple[str, str]] = {}
    for source, line in _lines(path, faults) if path.exists() else ():
        key, *value = line.split(maxsplit=1)
        if key in table:
            faults.append(Fault(source, "line twice", f'"{key}" is already on {table[key][0]}; remove one'))
        else:
            table[key] = (source, value[0] if value else "")
    return table


@dataclass(frozen=True)
class _Segment:
    """A part of a recording, as `Utterance` has it."""

    source: str
    recording: str
    offset: float | None = None
    duration: float | None = None
    channel: str | None = None


def _segments(
    lines: dict[str, tuple[str, str]], recordings: dict[str, tuple[str, str]], faults: list[Fault]
) -> dict[str, _Segment]:
    """Returns {utt_id: segment} of the lines of a Kaldi `segments` file.

    Source: extract-segments.cc (an end of -1 means up to the end of the recording; a fifth column is the channel, from
    0, and -1 is none).
    """
    segments: dict[str, _Segment] = {}
    for utt_id, (source, rest) in lines.items():
        fields = rest.split()
        try:
            start, end = map(float, fields[1:3])
        except ValueError:  # too few, or no numbers
            start, end = math.nan, math.nan
        channel = fields[3] if len(fields) > 3 else "-1"
        duration = None if end == -1 else end - start
        is_part = 0 <= start < math.inf and (duration is None or 0 < duration < math.inf)
        if not is_part or len(fields) > 4 or not re.fullmatch("-1|[0-9]+", channel):
            words = (
                "expected UTT_ID RECORDING START END in seconds, and no more or the number of a channel from 0, got "
                f"{rest[:80]!r} after the utt_id"
            )
            faults.append(Fault(source, "segment", words))
        elif fields[0] not in recordings:
            faults.append(Fault(source, "recording", f'the recording "{fields[0]}" is not in wav.scp'))
        else:
            segments[utt_id] = _Segment(source, fields[0], start, duration, None if channel == "-1" else channel)
    return segments
