"""The whole pipeline from one recipe, in one run folder (`mpq run`).

A stage has inputs, all that its result depends on: its options, the files of the stages before it and the data (all by
their contents, see `mpq.identity`), and, but for trainings, the version of mpq. A stage whose inputs and results are
as recorded in `run.json` is skipped; one that was cut off goes on where its own journal or state says; another one is
done anew, and what it wrote before is moved to `replaced-N/` first. Each stage says which of these it is. Nothing here
computes: stages are the functions behind the commands.

The folder: `train/` (checkpoint), `search/` (the checkpoint folder of the model found), `float/SET/`, `searched/SET/`,
`packed/SET/` and `finetuned/SET/` (evaluations), `sensitivity.json`, `allocation.json`, `packed.safetensors`,
`finetune/`, `comparison-SET.json`, `comparison-searched-SET.json` and `comparison-finetuned-SET.json`, `run.json`.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.identity import Inputs, file_sha256
from mpq.loading import RUN_FILE
from mpq.pipeline.aside import Aside, Moved
from mpq.pipeline.checks import check_run
from mpq.pipeline.record import RunRecord, RunResult, StageReport
from mpq.pipeline.setting import Setting
from mpq.pipeline.stages import Stage, stages_of

_log = logging.getLogger(__name__)


def run(recipe: Recipe, out: Path, *, dry_run: bool = False, device: str = "auto", quiet: bool = False) -> RunResult:
    """Does the stages of a recipe that are not done yet.

    Args:
        recipe: As `load_recipe` returned it.
        out: The run folder.
        dry_run: Do nothing, say what would be done.
        device: As in `mpq.runtime.choose_device`.
        quiet: Say and show nothing on the way.

    Raises:
        MpqError: What the recipe lacks, or what a stage's command refuses.
    """
    out = Path(out)
    check_run(recipe, device)
    record, aside = RunRecord(out / RUN_FILE), Aside(out)
    reports: list[StageReport] = []
    for stage in stages_of(Setting(recipe, out, device, quiet)):
        anew = [one.name for one in reports if one.name in stage.after and one.action != "skipped"]
        if dry_run and anew:
            report = StageReport(stage.name, "run", f"reads what {' and '.join(anew)} will write", None, {})
        else:
            todo = _decide(stage, record.of(stage.name))
            if not dry_run and todo.action != "skipped":
                reports.append(_do(todo, record, aside, quiet))
                continue
            report = _reported(todo)
        _say(report, quiet)
        reports.append(report)
    return RunResult(out, tuple(reports), dry_run)


@dataclass(frozen=True)
class _Todo:
    """What is to become of a stage.

    Attributes:
        stage: The stage.
        inputs: What its result depends on now.
        known: What is on record of it.
        action: "skipped", "run" or "resumed".
        reason: Why.
    """

    stage: Stage
    inputs: Inputs
    known: dict[str, Any]
    action: str
    reason: str


def _decide(stage: Stage, known: dict[str, Any]) -> _Todo:
    """Returns what is to become of a stage.

    Raises:
        MpqError: The trained model is another one than the training has written.
    """
    inputs = stage.inputs()
    action, reason = _decided(stage, known, inputs)
    return _Todo(stage, inputs, known, action, reason)


def _decided(stage: Stage, known: dict[str, Any], inputs: Inputs) -> tuple[str, str]:
    """Returns the action and the reason of `_decide`."""
    change = inputs.change(known) if "fingerprint" in known else None
    spoilt = ""
    if "fingerprint" in known and change is None:
        spoilt = _spoilt(stage, known)
        if not spoilt:
            return "skipped", "done, and its inputs are unchanged"
    if started := known.get("started"):
        before = started.get("stopped", "was cut off")
        since = inputs.change(started)
        return ("resumed", f"{before}, goes on") if since is None else ("run", _changed(f"{before}, and its", since))
    if not known:
        return "run", "not done yet"
    if change is None:
        return "run", spoilt
    kept = "" if stage.is_replaced else "; a finished training is not replaced, another one needs another --out"
    return "run", _changed("its", change) + kept


def _changed(whose: str, change: str) -> str:
    return f"{whose} inputs have changed ({change})"


def _spoilt(stage: Stage, known: dict[str, Any]) -> str:
    """Returns which result is not as it was written, in words; "" where all are.

    Raises:
        MpqError: It is the trained model.
    """
    for path in stage.outputs:
        if not path.exists():
            return f"its result {path} is gone"
    for path in stage.outputs:
        if file_sha256(path) != known["outputs"].get(str(path.relative_to(stage.out))):
            if not stage.is_replaced:
                raise MpqError(
                    f"{path}: changed since the training; put it back, or delete {path.parent} to train anew"
                )
            return f"its result {path} is changed"
    return ""


def _reported(todo: _Todo) -> StageReport:
    """Returns the report of a stage that is not done now."""
    if todo.action == "skipped":
        return StageReport(todo.stage.name, todo.action, todo.reason, todo.known["seconds"], todo.known["result"])
    return StageReport(todo.stage.name, todo.action, todo.reason, None, {})


def _say(report: StageReport, quiet: bool) -> None:
    if not quiet:
        _log.info("%s: %s%s", report.name, report.reason, "; skipped" if report.action == "skipped" else "")


def _do(todo: _Todo, record: RunRecord, aside: Aside, quiet: bool) -> StageReport:
    """Does a stage and puts it on record, while it is under way and when it is done."""
    stage, known = todo.stage, todo.known
    kept = stage.kept()
    moved = _make_room(todo, kept, aside)
    if moved.pairs:
        todo = replace(todo, reason=f"{todo.reason}; what it wrote before is now in {aside.folder}")
    _say(_reported(todo), quiet)
    noted = {"kept": {path.name: inputs.to_json() for path, inputs in kept.items()}} if kept else {}
    before = known["started"]["seconds"] if todo.action == "resumed" else 0.0
    start, there = time.monotonic(), _times(stage)
    started = todo.inputs.to_json() | {"seconds": before}
    record.write(stage.name, noted | {"started": started})
    try:
        result = stage.act()
    except MpqError:
        if _times(stage) == there:  # it was refused, and nothing was done
            moved.put_back()
            record.write(stage.name, known)
        else:
            record.write(stage.name, noted | {"started": _stopped(started, start) | {"stopped": "ended in an error"}})
        raise
    except BaseException:
        record.write(stage.name, noted | {"started": _stopped(started, start)})
        raise
    seconds = _stopped(started, start)["seconds"]
    outputs = {str(path.relative_to(stage.out)): file_sha256(path) for path in stage.outputs}
    done = todo.inputs.to_json() | {"seconds": seconds, "outputs": outputs, "result": result}
    record.write(stage.name, done | noted)
    return StageReport(stage.name, todo.action, todo.reason, seconds, result)


def _stopped(started: dict[str, Any], start: float) -> dict[str, Any]:
    """Returns what is on record of a stage that was begun, with the time that it has taken since `start`."""
    return started | {"seconds": round(started["seconds"] + time.monotonic() - start, 1)}


def _make_room(todo: _Todo, kept: dict[Path, Inputs], aside: Aside) -> Moved:
    """Sets aside what a stage wrote with other inputs, or what was spoilt, but for what has unchanged inputs."""
    stage, known = todo.stage, todo.known
    if todo.action == "resumed" or not known or not stage.is_replaced:
        return Moved(())
    were = known.get("kept", {})
    staying = [path for path, inputs in kept.items() if inputs.change(were.get(path.name, {})) is None]
    places = stage.places()
    places += [
        path
        for path in (stage.out / name for name in known.get("outputs", {}))
        if path not in places and not set(path.parents) & set(places)
    ]
    return aside.move(places, staying)


def _times(stage: Stage) -> dict[Path, int]:
    """Returns the time of change of each file that a stage has written."""
    files = [file for place in stage.places() for file in (place.rglob("*") if place.is_dir() else [place])]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}
