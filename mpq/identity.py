"""Who is who: whether a file, a data set, a set of options is the same as before.

A *file* is its bytes (SHA-256). *Data* are what a manifest says of each utterance, in its order, and the bytes of their
audio files; where they lie does not count, so a corpus that was moved or copied is the same corpus. *Options* are put
on record in full, all defaults written out, so a default that another version of mpq changes is a changed option; an
option that the record does not know, because it is new, counts only where it does not have its default.

Corpora are large, so the digest of a file is remembered: within the process, and in `files.sqlite` in the cache folder
(`cache_folder`). What is remembered holds for the same path as long as the file's size, times of change (mtime and
ctime) and inode are the same: this trusts the file system that changed bytes change one of these. A file that was
changed in the last tenth of a second is read again, because its next change might not be seen in its times.
"""

import functools
import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

from pydantic import BaseModel

from mpq.config import sections
from mpq.errors import MpqError
from mpq.files import digest, make_folder, sha256_file

NEUTRAL = ("save_minutes", "workers", "tensorboard")
"""Options that change no result: how a training is saved, read and shown."""
UNSETTLED_SECONDS = 0.1
"""The time after a change for which a digest is not remembered: file systems count time in steps of milliseconds."""

_log = logging.getLogger(__name__)


class Spoken(Protocol):
    """The fields of an utterance (`mpq.speech.manifests.Utterance`) that tell it from others."""

    @property
    def utt_id(self) -> str: ...
    @property
    def audio_path(self) -> Path: ...
    @property
    def text(self) -> str | None: ...
    @property
    def duration(self) -> float | None: ...
    @property
    def offset(self) -> float | None: ...
    @property
    def speaker(self) -> str | None: ...
    @property
    def channel(self) -> str | None: ...


# ---- inputs


@dataclass(frozen=True)
class Inputs:
    """All that a result depends on.

    Attributes:
        values: JSON: options as {section: {key: value}} with the names of a recipe, digests of files and data.
    """

    values: dict[str, Any]

    @classmethod
    def of(cls, **values: Any) -> "Inputs":
        """Returns the inputs with these names; tuples become lists, as in the file that they are read from again."""
        return cls(json.loads(json.dumps(values)))

    @property
    def fingerprint(self) -> str:
        """The digest of the values."""
        return digest(self.values)

    def to_json(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "inputs": self.values}

    def change(self, record: object) -> str | None:
        """Returns the first difference from the inputs on record, in words; None where they are the same.

        Args:
            record: JSON that has what `to_json` returned for the earlier result.
        """
        then = record.get("inputs") if isinstance(record, dict) else None
        if not isinstance(then, dict):
            return "an older version of mpq wrote it, which did not put its inputs on record"
        return _difference(then, self.values, ())


def options_of(section: BaseModel, without: Collection[str] = (), only: Collection[str] | None = None) -> Any:
    """Returns the options of a recipe's section that a result depends on, with all defaults, as JSON.

    Args:
        section: The section.
        without: Keys to leave out, besides the neutral ones.
        only: The keys to return; None: all.
    """
    values = section.model_dump(mode="json", include=None if only is None else set(only))
    values = {key: value for key, value in values.items() if key not in NEUTRAL and key not in without}
    if "noise" in values:
        values["noise"] = [_noise(name) for name in values["noise"]]
    return values


_MISSING = object()


def _difference(then: Any, now: Any, place: tuple[str, ...]) -> str | None:
    """Returns the first difference between two JSON values, "train.epochs: 3 there, 4 now"; None where there is none.

    Args:
        then: The value on record, or `_MISSING`.
        now: The present value, or `_MISSING`.
        place: The keys that lead to the value.
    """
    if isinstance(now, dict) and (isinstance(then, dict) or then is _MISSING):
        before: dict[str, Any] = then if isinstance(then, dict) else {}
        for key in dict.fromkeys([*now, *before]):
            if found := _difference(before.get(key, _MISSING), now.get(key, _MISSING), (*place, key)):
                return found
        return None
    if then == now or (then is _MISSING and now == _default(place)):
        return None
    if _is_digest(then) and _is_digest(now):
        return f"{'.'.join(place)}: other contents"
    return f"{'.'.join(place)}: {_shown(then)} there, {_shown(now)} now"


def _default(place: tuple[str, ...]) -> Any:
    """Returns the default of an option, as JSON; `_MISSING` where the place is not that of an option."""
    section = sections().get(place[-2]) if len(place) > 1 else None
    if section is None or place[-1] not in section.model_fields:
        return _MISSING
    return section().model_dump(mode="json", include={place[-1]})[place[-1]]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _shown(value: Any) -> str:
    if value is _MISSING or value is None:
        return "none"
    text = value[:12] if _is_digest(value) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- data


def data_identity(utterances: Iterable[Spoken]) -> str:
    """Returns a digest of what a manifest says of these utterances, in this order, and of their audio."""
    items = list(utterances)
    contents = _contents({item.audio_path for item in items})
    whole = hashlib.sha256()
    for item in items:
        said = [item.utt_id, item.text, item.offset, item.duration, item.speaker, contents[item.audio_path]]
        said += [] if item.channel is None else [item.channel]  # so that data without are as they always were
        whole.update(json.dumps(said).encode() + b"\n")
    return whole.hexdigest()


def _noise(name: str) -> str:
    """Returns what tells a source of noise from others: a synthetic one's name, or a digest of recordings."""
    path = Path(name)
    if not path.exists():  # synthetic, or missing, which the training says
        return name
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    contents = _contents(set(files))
    return digest([contents[one] for one in files])


# ---- files


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal; it is read only where it has changed since the last time.

    Raises:
        MpqError: The file cannot be read.
    """
    path = Path(path)
    return _contents({path})[path] or sha256_file(path)  # which says why it cannot be read


def cache_folder() -> Path:
    """Returns the folder for what is worth keeping: $MPQ_CACHE, $XDG_CACHE_HOME/mpq or ~/.cache/mpq."""
    if folder := os.environ.get("MPQ_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mpq"


@dataclass(frozen=True)
class _State:
    """A file as it was when it was looked at.

    Attributes:
        path: Its absolute path.
        signs: Its size, times of change and inode, one of which changes with its bytes.
        changed: When it was changed last, seconds since 1970. This is the ctime, which nobody can set.
    """

    path: bytes
    signs: str
    changed: float

    @classmethod
    def of(cls, path: Path) -> "_State | None":
        try:
            stat = os.stat(path)
        except (OSError, ValueError):
            return None
        if not S_ISREG(stat.st_mode):  # a device or a pipe may have no end
            return None
        signs = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        return cls(os.fsencode(os.path.abspath(path)), signs, stat.st_ctime)


_remembered: dict[_State, str] = {}


def _contents(paths: Collection[Path]) -> dict[Path, str | None]:
    """Returns the SHA-256 of each file; None for one that cannot be read."""
    now = time.time()
    states = {path: _State.of(path) for path in paths}
    _remembered.update(_recalled([state for state in states.values() if state and state not in _remembered]))
    todo = [path for path, state in states.items() if state and state not in _remembered]
    read = _all_read(todo)
    fresh = {
        state: found
        for path, found in read.items()
        if found and (state := states[path]) and now - state.changed > UNSETTLED_SECONDS
    }
    _remembered.update(fresh)
    _record(fresh)
    return {path: read.get(path) or (_remembered.get(state) if state else None) for path, state in states.items()}


def _all_read(paths: Collection[Path]) -> dict[Path, str | None]:
    if not paths:
        return {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(_read, paths), strict=True))


def _read(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except MpqError:
        return None


def _recalled(states: Collection[_State]) -> dict[_State, str]:
    """Returns what the cache folder has of these files."""
    found = {}

    def look(store: sqlite3.Connection) -> None:
        for state in states:
            row = store.execute("SELECT sha256 FROM files WHERE path = ? AND signs = ?", (state.path, state.signs))
            if known := row.fetchone():
                found[state] = str(known[0])

    if states and os.path.exists(_store_path()):
        _use_store(look)
    return found


def _record(found: Mapping[_State, str]) -> None:
    """Puts digests into the cache folder."""

    def write(store: sqlite3.Connection) -> None:
        rows = [(state.path, state.signs, sha256) for state, sha256 in found.items()]
        store.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)

    if found:
        _use_store(write)


def _store_path() -> Path:
    return cache_folder() / "files.sqlite"


def _use_store(work: Callable[[sqlite3.Connection], None]) -> None:
    """Does something with the cache folder's digests, as one transaction; says so where that is not possible."""
    path = _store_path()
    try:
        make_folder(path.parent)
        with closing(sqlite3.connect(path, timeout=20)) as store, store:
            # always, as another process may have made the file a moment ago, and no table in it yet
            store.execute("CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, signs TEXT, sha256 TEXT)")
            work(store)
    except (sqlite3.Error, MpqError) as error:
        _complain(str(path), str(error))


@functools.cache  # so that each reason is told once
def _complain(path: str, reason: str) -> None:
    _log.warning("%s: digests of files are not kept there: %s", path, reason)
