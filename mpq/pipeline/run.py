"""The whole pipeline from one recipe, in one run folder (`mpq run`).

Each stage has a fingerprint of all that its result depends on: its options, the files of the stages before it (by their
content), the data (manifests by content, audio files by size and time of change) and the version of mpq. A stage whose
fingerprint and results are as recorded in `run.json` is skipped; one that was cut off goes on where its own journal or
state says; each stage says which of these it is. Nothing here computes: stages are the functions behind the commands.

The folder: `train/` (checkpoint), `search/` (the checkpoint folder of the model found), `float/SET/`, `searched/SET/`,
`packed/SET/` and `finetuned/SET/` (evaluations), `sensitivity.json`, `allocation.json`, `packed.safetensors`,
`finetune/`, `comparison-SET.json`, `comparison-searched-SET.json` and `comparison-finetuned-SET.json`, `run.json`.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mpq import __version__
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import make_folder, read_json, sha256_file, write_json
from mpq.loading import RUN_FILE
from mpq.pipeline.record import RUN_FORMAT, RunResult, StageReport
from mpq.pipeline.stages import Stage, quantizer, stages_of
from mpq.runtime import choose_device
from mpq.search.space import search_space
from mpq.speech.manifests import read_data
from mpq.training.building import encoder_options

TRAININGS = ("train", "search", "finetune")
"""Stages that an upgrade of mpq does not repeat: they may have taken a week."""


def run(recipe: Recipe, out: Path, *, dry_run: bool = False, device: str = "auto", quiet: bool = False) -> RunResult:
    """Does the stages of a recipe that are not done yet.

    Args:
        recipe: As `load_recipe` returned it.
        out: The run folder.
        dry_run: Do nothing, say what would be done.
        device: As in `mpq.runtime.choose_device`.
        quiet: Say and show nothing on the way.

    Raises:
        MpqError: As of the stages.
    """
    out = Path(out)
    _check(recipe, device)
    record = _read_record(out / RUN_FILE)
    say = _silent if quiet else _say
    reports: list[StageReport] = []
    for stage in stages_of(recipe, out, device, quiet):
        anew = [one.name for one in reports if one.name in stage.after and one.action != "skipped"]
        if dry_run and anew:
            reports.append(StageReport(stage.name, "run", f"reads what {' and '.join(anew)} will write", None, {}))
            say(f"{stage.name}: {reports[-1].reason}")
            continue
        version = [] if stage.name in TRAININGS else [__version__]
        fingerprint = _fingerprint([version, stage.inputs()])
        known = record.get(stage.name, {})
        action, reason = _decide(known, fingerprint, stage, out)
        if action == "skipped" or dry_run:
            say(f"{stage.name}: {reason}" + ("; skipped" if action == "skipped" else ""))
            seconds, result = (known["seconds"], known["result"]) if action == "skipped" else (None, {})
            reports.append(StageReport(stage.name, action, reason, seconds, result))
            continue
        say(f"{stage.name}: {reason}")
        kept = {name: _fingerprint(inputs()) for name, inputs in stage.kept.items()}
        if stage.folder and known and action == "run":
            _clear(stage.folder, {name for name in kept if known.get("kept", {}).get(name) == kept[name]})
        if kept:
            known = known | {"kept": kept}
        make_folder(out)
        before = known["started"]["seconds"] if action == "resumed" else 0.0
        start = time.monotonic()
        started = {"fingerprint": fingerprint, "seconds": before}
        record[stage.name] = known | {"started": started}  # what is known of a result is true as long as that is there
        try:
            _write_record(out, record)
            result = stage.act()
        except MpqError:  # refused, not cut off, unless it was on its way before
            if action != "resumed" and "fingerprint" in known:
                record[stage.name] = known
            raise
        finally:
            started["seconds"] = round(before + time.monotonic() - start, 1)
            _write_record(out, record)
        record[stage.name] = {
            "fingerprint": fingerprint,
            "seconds": started["seconds"],
            "outputs": {str(path.relative_to(out)): sha256_file(path) for path in stage.outputs},
            "result": result,
        } | ({"kept": kept} if kept else {})
        _write_record(out, record)
        reports.append(StageReport(stage.name, action, reason, started["seconds"], result))
    return RunResult(out, tuple(reports), dry_run)


def _check(recipe: Recipe, device: str) -> None:
    """Raises MpqError for what would else come to light only after the training: all of it at once."""
    choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise MpqError(
            "mpq run is one process; train with torchrun (torchrun ... -m mpq train RECIPE --out RUN/train), then "
            "`mpq run RECIPE --out RUN` takes the training as it is"
        )
    data, stages, faults = recipe.data, set(recipe.stages), []
    names = [*data.train, data.dev] if {"train", "search", "finetune"} & stages else []
    names += data.test.values() if {"evaluate", "compare"} & stages else []
    names += [data.calibration or data.train[0]] if "sensitivity" in stages else []
    names += [recipe.search.held_out] if "search" in stages else []
    names += [data.calibration] if "search" in stages and (recipe.search.trained or recipe.checkpoint) else []
    for name in dict.fromkeys(name for name in names if name):
        try:
            read_data(recipe.path(name))
        except MpqError as error:
            faults.append(str(error))
    wanted = []
    if "finetune" in stages:
        wanted += [("finetune", "transcript_weight", data.train)] if recipe.finetune.transcript_weight else []
        wanted += [("finetune", "select", [data.dev])] if recipe.finetune.select == "wer" else []
    is_own = "search" in stages and recipe.checkpoint is None  # the search of a model of this recipe
    if is_own and recipe.search.held_out and recipe.search.loss != "distillation":
        wanted += [("search", "held_out", [recipe.search.held_out])]
    for section, key, some in wanted if not faults else []:
        if all(item.text is None for name in some if name for item in read_data(recipe.path(name))):
            what = f"[{section}] {key}: {json.dumps(getattr(getattr(recipe, section), key))}"
            faults.append(f"{what} needs transcripts in {', '.join(map(str, some))}, which has none")
    try:
        if is_own:
            own = encoder_options(recipe)
            search_space(recipe.search, own.ffn_shapes(), own.width, is_trained=recipe.search.trained)
    except MpqError as error:
        faults += str(error).splitlines()
    try:
        quantizer(recipe)
    except MpqError as error:
        faults.append(f"[sensitivity] {error}")
    if faults:
        raise MpqError("\n".join(faults))


def _read_record(path: Path) -> dict[str, Any]:
    """Returns what `run.json` says of each stage; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        stages = dict(read_json(path, RUN_FORMAT)["stages"])
        for known in stages.values():
            if "started" in known:
                float(known["started"]["seconds"]), str(known["started"]["fingerprint"])
            dict(known.get("kept", {}))
            if "fingerprint" in known:
                float(known["seconds"]), dict(known["outputs"]), dict(known["result"])
    except (KeyError, TypeError, ValueError) as error:
        raise MpqError(
            f"{path}: not as mpq run wrote it ({error!r}); delete it, and finished stages are redone"
        ) from None
    return stages


def _write_record(out: Path, record: dict[str, Any]) -> None:
    write_json(out / RUN_FILE, {"format": RUN_FORMAT, "stages": record})


def _say(text: str) -> None:
    print(f"mpq run: {text}", file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    pass


def _decide(known: dict[str, Any], fingerprint: str, stage: Stage, out: Path) -> tuple[str, str]:
    """Returns what is to become of a stage, and why.

    Raises:
        MpqError: The trained model is another one than the training has written.
    """
    if known.get("fingerprint") == fingerprint:
        lost = [path for path in stage.outputs if not path.exists()]
        changed = [
            path
            for path in stage.outputs
            if path.exists() and sha256_file(path) != known["outputs"].get(str(path.relative_to(out)))
        ]
        if not lost and not changed:
            return "skipped", "done, and its inputs are unchanged"
        if changed and stage.name == "train":
            raise MpqError(
                f"{changed[0]}: changed since the training; put it back, or delete {out / 'train'} to train anew"
            )
    started = known.get("started", {})
    if started.get("fingerprint") == fingerprint:
        return "resumed", "was cut off, goes on"
    if started:
        return "run", "was cut off, and its inputs have changed since"
    if not known:
        return "run", "not done yet"
    if known["fingerprint"] != fingerprint:
        kept = "; the finished training is kept, so this needs another --out" if stage.name == "train" else ""
        return "run", f"its inputs have changed (options, data, or an earlier stage){kept}"
    return "run", f"its result {(lost + changed)[0]} is {'gone' if lost else 'changed'}"


def _clear(folder: Path, kept: set[str]) -> None:
    """Removes a folder, but for what is to be kept in it."""
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    for path in folder.glob("*") if kept else ():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            path.unlink()


def _fingerprint(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
