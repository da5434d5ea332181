"""Files that are whole or not there: atomic writes, JSON with a named format, checksums.

A file that mpq writes goes to `NAME.partial` in the same folder first and is renamed when it is complete. The name is
fixed, not random, so a run that was killed leaves at most one such file, and the same command run again replaces it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpq.errors import MpqError

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def partial_path(path: Path) -> Path:
    """Returns the name under which `path` is written until it is complete."""
    return path.with_name(path.name + ".partial")


def check_output(out: Path, *inputs: Path | None) -> None:
    """Checks before any work that a file can be written in the end.

    Args:
        out: The file that a command will write.
        inputs: The files that the command reads; those that are None are passed over.

    Raises:
        MpqError: `out` is a folder, lies in no folder that can be written to, or is one of the inputs.
    """
    if not out.name or out.is_dir():
        raise MpqError(f"{out}: a folder; expected the name of a file to write")
    if not out.parent.is_dir():
        raise MpqError(f"{out}: the folder {out.parent} does not exist; create it first")
    if not os.access(out.parent, os.W_OK):
        raise MpqError(f"{out}: the folder {out.parent} cannot be written to")
    for path in inputs:
        if path is not None and out.exists() and path.exists() and out.samefile(path):
            raise MpqError(f"{out}: is read by this command and would be overwritten; choose another --out")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a path to write to; renames it to `path` when the block ends without an error.

    Args:
        path: The file to create or replace. Its folder must exist.

    Raises:
        MpqError: The folder does not exist or cannot be written to.
    """
    path = Path(path)
    check_output(path)
    temporary = partial_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, MpqError) or (reason := _system_fault(error)) is None:
            raise
        raise MpqError(f"{path}: cannot be written: {reason}") from error


def _system_fault(error: BaseException) -> str | None:
    """Returns what the system refused, in its words; None where the error is none of the system's.

    torch.save raises an error of its own after the system's, and safetensors has the system's as text.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found[1]))
    return _system_fault(error.__context__) if error.__context__ else None


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there yet.

    Raises:
        MpqError: It cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MpqError(f"{path}: the folder cannot be made: {error.strerror}") from None


def digest(value: Any) -> str:
    """Returns the SHA-256 of a value's JSON, by which two of them are told apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically. NaN and infinity are refused (a bug in mpq)."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    text = _HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text)  # a path that is not UTF-8: read back as it is
    pair = r"\[\n\s+([-+.e\d]+),\n\s+([-+.e\d]+)\n\s+\]"
    write_text(path, re.sub(pair, r"[\1, \2]", text) + "\n")  # a point of a curve on one line


def check_input(path: Path) -> None:
    """Raises MpqError for what has no end or may never begin, such as a device or a pipe; what is not there passes."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise MpqError(f"{path}: a device or a pipe; expected a file, so write its content to one")


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        MpqError: The file is missing, unreadable or not UTF-8.
    """
    check_input(path)
    try:
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise MpqError(f"{path}: no such file") from None
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MpqError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def read_json(path: Path, format: str) -> dict[str, Any]:
    """Returns the JSON object in `path`, whose key "format" must equal `format`.

    Raises:
        MpqError: The file is missing, not JSON, not an object, or of another format; the message names which.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise MpqError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise MpqError(f"{path}: not JSON of a reasonable shape: {error}") from None
    if not isinstance(value, dict):
        raise MpqError(f"{path}: expected a JSON object of format {format}, got a {type(value).__name__}")
    if value.get("format") != format:
        raise MpqError(f'{path}: "format": expected "{format}", got {json.dumps(value.get("format"))}')
    return value


_REMEDIES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"),
    (
        rb"(?i)\s*<(!doctype|html|head|\?xml)",
        "a web page, not the file itself; look at it in a browser, then download again",
    ),
    (
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "a file of torch.save or another zip archive or pickle, which has no configuration; save "
        "the whole model (NeMo: model.save_to('model.nemo'))",
    ),
    (
        rb"GGUF|\x89HDF|\x08[\x03-\x0f]\x12",
        "a model in another format (GGUF, HDF5 or ONNX); give the checkpoint that it was made from",
    ),
    (rb"7z\xbc\xaf|Rar!|\xfd7zXZ|BZh[1-9]|\x28\xb5\x2f\xfd", "a compressed file; unpack it"),
)


def foreign_content(start: bytes) -> str | None:
    """Returns what a file is, by its first bytes, and what to do; None for one that is none of what users mix up.

    >>> foreign_content(b"")
    'empty (0 bytes); copy or download it again'
    """
    if not start:
        return "empty (0 bytes); copy or download it again"
    start = start.removeprefix(b"\xef\xbb\xbf")
    return next((words for pattern, words in _REMEDIES if re.match(pattern, start, re.DOTALL)), None)


def file_start(path: Path) -> bytes:
    """Returns the first bytes of a file, for `foreign_content`.

    Raises:
        MpqError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror or error}") from None


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal.

    Raises:
        MpqError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise MpqError(f"{path}: no such file") from None
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror or error}") from error
