"""What became of the stages of a recipe: now (`RunResult`), and in the run folder's `run.json` (`RunRecord`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.files import make_folder, read_json, write_json

RUN_FORMAT = "mpq.run/1"


@dataclass(frozen=True)
class StageReport:
    """What became of a stage.

    Attributes:
        name: The stage.
        action: "skipped", "run" or "resumed"; in a dry run what would become of it.
        reason: Why.
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
        stages: What became of each.
        is_dry: Whether nothing was done.
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


class RunRecord:
    """`run.json`: what is known of each stage.

    Of a stage that is done: "fingerprint" and "inputs" (as `mpq.identity.Inputs`), "seconds", "outputs" (the digest of
    each file) and "result" (its figures). Of one that is not: "started", with its inputs, the seconds so far, and why
    it stopped where that was an error. "kept" has the inputs of the folders that a change may leave in place.

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
                self._stages = dict(read_json(path, RUN_FORMAT)["stages"])
                for known in self._stages.values():
                    _check(known)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise MpqError(
                    f"{path}: not as mpq run wrote it ({error!r}); delete it, and finished stages are redone"
                ) from None

    def of(self, stage: str) -> dict[str, Any]:
        """Returns what is known of a stage; nothing where it was never begun."""
        return self._stages.get(stage, {})

    def write(self, stage: str, known: dict[str, Any]) -> None:
        """Puts on record what is known of a stage; nothing is as if it had never been begun."""
        self._stages[stage] = known
        stages = {name: one for name, one in self._stages.items() if one}
        make_folder(self.path.parent)
        write_json(self.path, {"format": RUN_FORMAT, "stages": stages})


def _check(known: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where what is known of a stage is not as `RunRecord` writes it."""
    dict(known.get("kept", {}))
    if "started" in known:
        float(known["started"]["seconds"]), str(known["started"]["fingerprint"])
    if "fingerprint" in known:
        float(known["seconds"]), dict(known["outputs"]), dict(known["result"])
