"""The whole pipeline from one recipe, in one run folder (`mpq run`).

The inputs of a stage are all that its result depends on: its options, the files of the stages before it and the data
(all by their contents, see `mpq.identity`), and, but for trainings, the version of mpq. A stage whose inputs and
results are as recorded in `run.json` is skipped; one that was cut off goes on where its own journal or state says;
another one is done anew, and what lay in its place is moved to `replaced-N/` first. A message says which of these
became of each stage. Nothing here computes: stages call the functions behind the commands.

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
        recipe: The recipe, as `load_recipe` returns it.
        out: The run folder.
        dry_run: Do nothing, and say what would be done.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
        quiet: Log no messages and show no progress.

    Raises:
        MpqError: The recipe lacks something, or a stage's command refuses its input.
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
    """The decision about a stage.

    Attributes:
        stage: The stage.
        inputs: Its inputs as they are now.
        known: Its entry in `run.json`; empty if there is none.
        action: "skipped", "run" or "resumed".
        reason: The reason for that, in words.
    """

    stage: Stage
    inputs: Inputs
    known: dict[str, Any]
    action: str
    reason: str


def _decide(stage: Stage, known: dict[str, Any]) -> _Todo:
    """Returns the decision about a stage, from its entry in `run.json`.

    Raises:
        MpqError: The trained model is another one than the training has written.
    """
    inputs = stage.inputs()
    action, reason = _decided(stage, known, inputs)
    return _Todo(stage, inputs, known, action, reason)


def _decided(stage: Stage, known: dict[str, Any], inputs: Inputs) -> tuple[str, str]:
    """Returns the action and the reason that make up the decision."""
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
    """Returns, in words, the first result that is not as it was written; "" if there is none.

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
    """Returns the report of a stage that is skipped, or of one before it is begun."""
    if todo.action == "skipped":
        return StageReport(todo.stage.name, todo.action, todo.reason, todo.known["seconds"], todo.known["result"])
    return StageReport(todo.stage.name, todo.action, todo.reason, None, {})


def _say(report: StageReport, quiet: bool) -> None:
    if not quiet:
        _log.info("%s: %s%s", report.name, report.reason, "; skipped" if report.action == "skipped" else "")


def _do(todo: _Todo, record: RunRecord, aside: Aside, quiet: bool) -> StageReport:
    """Does a stage; its entry in `run.json` is written when it begins and when it ends."""
    stage, known = todo.stage, todo.known
    kept = stage.kept()
    moved = _make_room(todo, kept, aside)
    if moved.pairs:
        todo = replace(todo, reason=f"{todo.reason}; what was there before is now in {aside.folder}")
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
    """Returns the entry of a stage that was begun, with the time since `start` added to its seconds."""
    return started | {"seconds": round(started["seconds"] + time.monotonic() - start, 1)}


def _make_room(todo: _Todo, kept: dict[Path, Inputs], aside: Aside) -> Moved:
    """Sets aside what lies where a stage is going to write, but for the folders whose own inputs are unchanged."""
    stage, known = todo.stage, todo.known
    is_left = not stage.is_replaced if known else stage.is_adopted
    if todo.action == "resumed" or is_left:
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
