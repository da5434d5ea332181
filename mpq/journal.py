"""Work that survives a kill: finished results, one JSON line each, under the fingerprint of what they belong to.

The journal lies beside the result that it leads up to (`NAME.journal`) and is removed when that is complete. A line is
written with one system call and flushed to the disk, so a kill at any time loses at most the line being written, which
is then dropped on reading. Several processes of one machine may append to the same journal.
"""

import json
import os
from pathlib import Path
from typing import Any

from mpq.errors import MpqError


class Journal:
    """Finished results of one piece of work.

    Args:
        path: The journal file.
        fingerprint: A digest of everything that the results depend on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self._header = Path(path), {"format": "mpq.journal/1", "fingerprint": fingerprint}

    def read(self) -> list[dict[str, Any]]:
        """Returns the finished results of an earlier run of the same work; none when there was no such run.

        Raises:
            MpqError: The journal belongs to other work, which would be lost.
        """
        return self._read()[0]

    def begin(self) -> None:
        """Makes the journal ready for `append`: writes its header, or removes a line that was cut off at its end."""
        entries, size = self._read()
        if entries:
            os.truncate(self.path, size)
        else:
            self.remove()
            self.append(self._header)

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """Returns the results and the size of the whole lines that hold them."""
        lines, size = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            size += len(line)
        if len(lines) == 1 and lines[0] != self._header:
            return [], 0  # nothing was finished, so nothing is lost
        if lines and lines[0] != self._header:
            raise MpqError(
                f"{self.path}: unfinished results of other input (model, data or options differ); "
                "repeat the command that began them, delete the file, or choose another --out"
            )
        return lines[1:], size

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a finished result; it is on the disk when this returns.

        Raises:
            MpqError: The journal cannot be written: no room, no permission.
        """
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MpqError(f"{self.path}: cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """Removes the journal: the result that it led up to is complete."""
        self.path.unlink(missing_ok=True)
