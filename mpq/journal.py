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
from mpq.files import read_text

_FORMAT = "mpq.journal/1"


class Journal:
    """Finished results of one piece of work.

    Args:
        path: Of the journal.
        fingerprint: Of everything that the results depend on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint

    def read(self) -> list[dict[str, Any]]:
        """Returns the finished results of an earlier run of the same work; none when there was no such run.

        Raises:
            MpqError: The journal belongs to other work, which would be lost.
        """
        if not self.path.exists():
            return []
        lines = read_text(self.path).split("\n")[:-1]  # what follows the last newline was cut off
        if not lines:
            return []
        header, *entries = map(json.loads, lines)
        if header.get("format") != _FORMAT or header.get("fingerprint") != self.fingerprint:
            raise MpqError(
                f"{self.path}: unfinished results of other input (model, data or options differ); "
                "repeat the command that began them, delete the file, or choose another --out"
            )
        return entries

    def begin(self) -> None:
        """Makes the journal ready for `append`: its header is there and its last line is whole."""
        if not self.read():
            self.path.write_bytes(b"")
            self.append({"format": _FORMAT, "fingerprint": self.fingerprint})
            return
        content = self.path.read_bytes()
        os.truncate(self.path, content.rindex(b"\n") + 1)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a finished result; it is on the disk when this returns."""
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Removes the journal: the result that it led up to is complete."""
        self.path.unlink(missing_ok=True)
