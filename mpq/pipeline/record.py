"""The result of `mpq run` (`RunResult`), and the record of all stages in the run folder's `run.json` (`RunRecord`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mpq.errors import MpqError
from mpq.faults import JsonObject, Number, Text, checked
from mpq.files import make_folder, read_json, write_json

RUN_FORMAT = "mpq.run/1"


@dataclass(frozen=True)
class StageReport:
    """The report on a stage.

    Attributes:
        name: The name of the stage.
        action: "skipped", "run" or "resumed"; in a dry run, the one that would be.
        reason: The reason for that, in words.
        seconds: Wall-clock time that the stage has taken, in earlier runs too if it was skipped or resumed; None if its
            result is not there.
        result: Its figures.
    """

    name: str
    action: str
    reason: str
    seconds: float | None
    result: dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """`mpq.run/1`: the stages in order.

    Attributes:
        out: The run folder.
        stages: A report on each stage.
        is_dry: Whether nothing was done, as this was a dry run.
    """

    out: Path
    stages: tuple[StageReport, ...]
    is_dry: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "format": RUN_FORMAT,
            "dry_run": self.is_dry,
            "stages": [
                {"name": one.name, "action": one.action, "reason": one.reason, "seconds": one.seconds} | one.result
                for one in self.stages
            ],
        }


class _Started(JsonObject):
    """What is on record of a stage that was begun."""

    fingerprint: str
    seconds: Number
    stopped: Text = ""


class _Known(JsonObject):
    """What is on record of a stage: all of the first four keys where it is done."""

    fingerprint: str | None = None
    seconds: Number | None = None
    outputs: dict[str, str] | None = None
    result: dict[str, Any] | None = None
    kept: dict[str, dict[str, Any]] = Field(default_factory=dict)
    started: _Started | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "_Known":
        given = [one is not None for one in (self.fingerprint, self.seconds, self.outputs, self.result)]
        if any(given) and not all(given):
            raise PydanticCustomError("whole", "fingerprint, seconds, outputs and result together")
        return self


class _Stages(JsonObject):
    """`run.json`."""

    stages: dict[str, _Known]


class RunRecord:
    """`run.json`: an entry for each stage that was begun.

    The entry of a stage that is done has "fingerprint" and "inputs" (of `mpq.identity.Inputs`), "seconds", "outputs"
    (the digest of each file) and "result" (its figures). The entry of a stage that is not done has "started", with
    inputs, the seconds so far, and "stopped" if it ended in an error. "kept" has the inputs of the folders that may
    stay where other inputs of the stage change.

    Args:
        path: The file.

    Raises:
        MpqError: The file is not as `mpq run` wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                checked(_Stages, raw := read_json(path, RUN_FORMAT), path)
            except MpqError as error:
                raise MpqError(
                    f"{error}: not as mpq run wrote it; delete the file, and finished stages are redone"
                ) from None
            self._stages = raw["stages"]

    def of(self, stage: str) -> dict[str, Any]:
        """Returns the entry of a stage; an empty one if it was never begun."""
        return self._stages.get(stage, {})

    def write(self, stage: str, known: dict[str, Any]) -> None:
        """Writes the entry of a stage; an empty one is removed, as if the stage had never been begun."""
        self._stages[stage] = known
        stages = {name: one for name, one in self._stages.items() if one}
        make_folder(self.path.parent)
        write_json(self.path, {"format": RUN_FORMAT, "stages": stages})
