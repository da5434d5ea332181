"""Manifests: lists of utterances and their transcripts.

They are JSON lines in NeMo's shape, or Kaldi or ESPnet data directories of plain paths. Relative audio paths are
relative to the folder of the file that names them, `wav.scp` included (unlike Kaldi, where they are relative to
wherever the command is started). All lines are looked at, and all faults are reported together, each as
"FILE:LINE: what is wrong and what to do".
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
from mpq.faults import JsonObject, by_place, fault, named
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
        duration: Seconds, as the manifest says; with an offset, how much of the file to read.
        offset: Seconds from the start of the file; None is the whole file.
        speaker: The speaker.
        source: The file and line that it was read from, such as "dev.jsonl:12".
    """

    utt_id: str
    audio_path: Path
    text: str | None
    duration: float | None
    offset: float | None
    speaker: str | None
    source: str


def read_data(path: Path) -> list[Utterance]:
    """Returns the utterances of a JSON-lines manifest or of a Kaldi data directory, in its order.

    Blank lines, a byte order mark and CRLF line ends are passed over; unknown keys are left alone. In a manifest
    "audio_filepath" is required; "utt_id" is by default the audio file's stem, with the offset if there is one, and
    with the line's number where that is taken. A Kaldi directory has `wav.scp`, and
    may have `segments` (a line is then an utterance; an end of -1 is the file's), `text` and `utt2spk`.

    Raises:
        MpqError: The path is neither, a line is not as it should be, an utt_id is not unique or cannot stand in a trn
            file, or there is no utterance. All faults are in the one error.
    """
    path = Path(path)
    faults: list[str] = []
    if not path.exists():
        raise MpqError(f"{path}: no such file; expected a JSON-lines manifest or a Kaldi data directory")
    utterances: list[Utterance] = []
    seen: dict[str, str] = {}
    for utterance in _kaldi(path, faults) if path.is_dir() else _manifest(path, faults):
        if not utterance.utt_id or re.search(r"[\s()]", utterance.utt_id):
            faults.append(
                f"{utterance.source}: utt_id: expected no whitespace and no parentheses, got "
                f"{json.dumps(utterance.utt_id)}; give another"
            )
        elif fold(utterance.utt_id) in seen:
            faults.append(
                f'{utterance.source}: utt_id "{utterance.utt_id}" is already that of {seen[fold(utterance.utt_id)]} '
                "(A-Z count as a-z, as in sclite); give each its own"
            )
        else:
            seen[fold(utterance.utt_id)] = utterance.source
            utterances.append(utterance)
    if faults:
        raise MpqError(list_faults(faults))
    if not utterances:
        raise MpqError(f"{path}: no utterances; expected at least one")
    return utterances


def list_faults(faults: Sequence[str]) -> str:
    """Returns the first faults, a line each, and how many more there are."""
    more = len(faults) - _SHOWN_FAULTS
    return "\n".join([*faults[:_SHOWN_FAULTS], *([f"and {more} more faults"] if more > 0 else [])])


def _lines(path: Path, faults: list[str]) -> Iterator[tuple[str, str]]:
    """Yields ("FILE:LINE", line) for each line that is not blank."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror or error}") from error
    # not str.splitlines, which also splits at characters that may stand in a JSON string, such as U+2028
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            faults.append(f"{path}:{number}: expected UTF-8 text, got byte {line[error.start]:#04x}")
            continue
        if text:
            yield f"{path}:{number}", text


def _whole(text: str) -> str:
    if _NO_TEXT.search(text):
        raise PydanticCustomError("text", "text without NUL and half surrogate pairs")
    return text


_Text = Annotated[str, AfterValidator(_whole)]


class _Line(JsonObject):
    """A line of a manifest."""

    audio_filepath: Annotated[str, Field(min_length=1), AfterValidator(_whole)]
    text: _Text | None = None
    duration: Annotated[float, Field(gt=0, lt=1e100)] | None = None
    offset: Annotated[float, Field(ge=0, lt=1e100)] | None = None
    speaker: _Text | int | None = None
    utt_id: _Text | None = None


def _manifest(path: Path, faults: list[str]) -> Iterator[Utterance]:
    """Yields the utterances of the manifest's good lines; the faults of the others go to `faults`."""
    used: set[str] = set()
    for source, line in _lines(path, faults):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{source}: expected a JSON object on one line: {getattr(error, 'msg', error)}")
            continue
        if not isinstance(record, dict):
            faults.append(f"{source}: expected a JSON object, got a {type(record).__name__}")
            continue
        try:
            values = _Line.model_validate(record)
        except ValidationError as error:
            faults += [f"{source}: {named(place)}: {fault(found)}" for place, found in by_place(error, record).items()]
            continue
        audio_path = path.parent / values.audio_filepath
        utt_id = values.utt_id
        if utt_id is None:
            utt_id = _default_id(audio_path, values.offset, source, used)
        used.add(fold(utt_id))
        speaker = None if values.speaker is None else str(values.speaker)
        yield Utterance(utt_id, audio_path, values.text, values.duration, values.offset, speaker, source)


def _default_id(audio_path: Path, offset: float | None, source: str, used: set[str]) -> str:
    """Returns the file's stem, with the offset if there is one, and with the line's number if that is taken."""
    utt_id = re.sub(r"[\s()]+", "_", audio_path.stem)
    if offset:
        utt_id += f"-{offset:g}"
    return f"{utt_id}-{source.rpartition(':')[2]}" if fold(utt_id) in used else utt_id


def _kaldi(folder: Path, faults: list[str]) -> Iterator[Utterance]:
    """Yields the utterances of a Kaldi data directory's good lines; the faults of the others go to `faults`."""
    if not (folder / "wav.scp").is_file():
        raise MpqError(f"{folder}: has no wav.scp; expected a Kaldi data directory or a JSON-lines manifest")
    recordings = _table(folder / "wav.scp", faults)
    for source, value in recordings.values():
        if value.startswith("|") or value.endswith("|"):
            faults.append(f"{source}: a shell command, which mpq never runs; write its output to a file and name that")
        elif re.search(r"\.ark:\d+", value):
            faults.append(f"{source}: a place in a Kaldi archive; expected a plain audio file")
        elif not value or "\0" in value:
            faults.append(f"{source}: expected a recording and the path of its audio file")
    texts, speakers = _table(folder / "text", faults), _table(folder / "utt2spk", faults)
    lines: dict[str, tuple[str, str, float | None, float | None]]
    if (folder / "segments").exists():
        lines = _segments(folder / "segments", recordings, faults)
    else:
        lines = {key: (source, key, None, None) for key, (source, _) in recordings.items()}
    for utt_id, (source, recording, offset, duration) in lines.items():
        path, text, speaker = recordings[recording][1], texts.get(utt_id), speakers.get(utt_id)
        yield Utterance(utt_id, folder / path, text and text[1], duration, offset, speaker and speaker[1], source)
    if not faults:  # else these would only follow from the others
        for utt_id, (source, _) in [*texts.items(), *speakers.items()]:
            if utt_id not in lines:
                faults.append(f'{source}: there is no utterance "{utt_id}"; remove the line or add its audio')


def _table(path: Path, faults: list[str]) -> dict[str, tuple[str, str]]:
    """Returns a Kaldi table, key -> ("FILE:LINE", rest of the line); an empty one if there is no such file."""
    table: dict[str, tuple[str, str]] = {}
    for source, line in _lines(path, faults) if path.exists() else ():
        key, *value = line.split(maxsplit=1)
        if key in table:
            faults.append(f'{source}: "{key}" is already on {table[key][0]}; remove one')
        else:
            table[key] = (source, value[0] if value else "")
    return table


def _segments(
    path: Path, recordings: dict[str, tuple[str, str]], faults: list[str]
) -> dict[str, tuple[str, str, float | None, float | None]]:
    """Returns utt_id -> ("FILE:LINE", recording, offset, duration) of a Kaldi `segments` file.

    Source: extract-segments.cc (an end of -1 means up to the end of the recording).
    """
    segments: dict[str, tuple[str, str, float | None, float | None]] = {}
    for utt_id, (source, rest) in _table(path, faults).items():
        fields = rest.split()
        try:
            start, end = map(float, fields[1:])
        except ValueError:  # too few, too many, or no numbers
            start, end = math.nan, math.nan
        duration = None if end == -1 else end - start
        if not (0 <= start < math.inf and (duration is None or 0 < duration < math.inf)):
            faults.append(
                f"{source}: expected UTT_ID RECORDING START END in seconds, got {rest[:80]!r} after the utt_id"
            )
        elif fields[0] not in recordings:
            faults.append(f'{source}: the recording "{fields[0]}" is not in wav.scp')
        else:
            segments[utt_id] = (source, fields[0], start, duration)
    return segments
