"""What became of the stages of a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_FORMAT = "mpq.run/1"


@dataclass(frozen=True)
class StageReport:
    """What became of a stage.

    Attributes:
        name: Of the stage.
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
