"""Old results are set aside, never removed: `mpq run` moves them to `replaced-1/`, `replaced-2/`, ... in its folder."""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from mpq.errors import MpqError
from mpq.files import make_folder


@dataclass(frozen=True)
class Moved:
    """The files and folders that were set aside together, as pairs: the old path and the new one of each."""

    pairs: tuple[tuple[Path, Path], ...]

    def put_back(self) -> None:
        """Moves all of it back; only empty folders may be in its old place."""
        for was, now in reversed(self.pairs):
            _remove_empty(was)
            os.rename(now, was)
            _remove_empty_above(now.parent, was.parent)


class Aside:
    """The folder for what one `mpq run` replaces: the first `replaced-N` that is not there yet.

    Args:
        out: The run folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        numbers = (number for number in range(1, 10**9) if not (out / f"replaced-{number}").exists())
        self.folder = out / f"replaced-{next(numbers)}"

    def move(self, places: Iterable[Path], staying: Collection[Path]) -> Moved:
        """Moves files and folders of the run folder to the same paths below `replaced-N`, on the same disk.

        Args:
            places: Files and folders to move; those that are not there are passed over.
            staying: Folders inside these that stay.

        Raises:
            MpqError: It cannot be moved.
        """
        pairs = []
        for was in _parts(places, staying):
            now = self.folder / was.relative_to(self.out)
            make_folder(now.parent)
            try:
                os.rename(was, now)
            except OSError as error:
                raise MpqError(f"{was}: cannot be moved to {now}: {error.strerror}; move it away yourself") from None
            pairs.append((was, now))
        return Moved(tuple(pairs))


def _parts(places: Iterable[Path], staying: Collection[Path]) -> Iterable[Path]:
    """Yields the places that there are; of a folder in which something stays, the other things that are in it."""
    for place in dict.fromkeys(places):
        if any(place in one.parents and one.exists() for one in staying):
            yield from (path for path in sorted(place.iterdir()) if path not in staying)
        elif os.path.lexists(place):
            yield place


def _remove_empty(folder: Path) -> None:
    """Removes a folder in which there are empty folders alone."""
    if folder.is_dir():
        for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            inner.rmdir()
        folder.rmdir()


def _remove_empty_above(folder: Path, end: Path) -> None:
    """Removes a folder and those above it as long as they are empty; `end` and what is above it stay."""
    while folder != end and folder not in end.parents and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
