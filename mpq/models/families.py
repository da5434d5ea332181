"""The model families: which classes there are, and which files of other frameworks each of them reads.

This table is the one place that knows them. To add a family, write its module (an `AsrModel` and, where it has files of
its own, a function that reads them) and add a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpq.errors import MpqError
from mpq.files import file_start, foreign_content
from mpq.models.base import AsrModel
from mpq.models.hybrid import HybridConformer
from mpq.models.nemo import NemoConformerCtc, read_nemo
from mpq.models.nemo_archive import nemo_files


@dataclass(frozen=True)
class ForeignFiles:
    """The files of another framework.

    Attributes:
        words: A description of them for messages, such as "a NeMo archive (.nemo)".
        find: Returns the files of the model at a path (a file or a folder); none where no model of the framework is.
        read: Returns the model at a path, float32, eval mode, on the CPU.
    """

    words: str
    find: Callable[[Path], tuple[Path, ...]]
    read: Callable[[Path], AsrModel]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model: The class. Its `family` is the key of the same name in the configurations that mpq writes.
        files: The files of the framework that it comes from; None for mpq's own.
    """

    model: type[AsrModel]
    files: ForeignFiles | None = None


FAMILIES = [
    Family(HybridConformer),
    Family(NemoConformerCtc, ForeignFiles("a NeMo archive (.nemo)", nemo_files, read_nemo)),
]


def family_class(name: str) -> type[AsrModel]:
    """Returns the class of the models whose configuration has this `family`.

    Raises:
        MpqError: No such family.
    """
    known = {family.model.family: family.model for family in FAMILIES}
    if name not in known:
        raise MpqError(f"family: expected {' or '.join(known)}, got {name!r}; another version of mpq may know it")
    return known[name]


def foreign_files(path: Path) -> tuple[Path, ...]:
    """Returns the files of another framework's model at a path, a file or a folder; none where there is no such model.

    The first family that finds some is asked.
    """
    return next((found for files in _readers() if (found := files.find(path))), ())


def read_foreign(path: Path) -> AsrModel:
    """Returns the model of another framework at a path, a file or a folder; float32, eval mode, on the CPU.

    Raises:
        MpqError: The files are those of no framework that mpq reads, or not whole.
    """
    for files in _readers():
        if files.find(path):
            return files.read(path)
    if what := foreign_content(file_start(path)):
        raise MpqError(f"{path}: {what}")
    words = ", ".join(files.words for files in _readers())
    raise MpqError(
        f"{path}: not a format that mpq reads; expected {words}, a checkpoint of `mpq train` or a file that `mpq pack` "
        "wrote"
    )


def _readers() -> list[ForeignFiles]:
    return [family.files for family in FAMILIES if family.files]
