"""The whole pipeline from one recipe, in one run folder (`mpq run`).

Each stage has a fingerprint of all that its result depends on: its options, the files of the stages before it (by their
content), the data (manifests by content, audio files by size and time of change) and the version of mpq. A stage whose
fingerprint and results are as recorded in `run.json` is skipped; one that was cut off goes on where its own journal or
state says; each stage says which of these it is. Nothing here computes: stages are the functions behind the commands.

The folder: `train/` (checkpoint), `float/SET/`, `packed/SET/` and `finetuned/SET/` (evaluations), `sensitivity.json`,
`allocation.json`, `packed.safetensors`, `finetune/`, `comparison-SET.json` and `comparison-finetuned-SET.json`,
`run.json`.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq import __version__
from mpq.allocation import allocate
from mpq.compare import compare, read_evaluations
from mpq.config import Recipe
from mpq.decoding import DecodeOptions
from mpq.errors import MpqError
from mpq.evaluate import Evaluation, evaluate
from mpq.files import read_json, sha256_file, write_json
from mpq.finetune import finetune
from mpq.finetune_loop import RESULT_FILE
from mpq.manifests import read_data
from mpq.models import load_model, model_file
from mpq.models.checkpoint import MODEL_FILE
from mpq.models.loading import PACKED_FILE, RUN_FILE
from mpq.pack import pack
from mpq.records import Allocation, SensitivityTable
from mpq.run_record import RUN_FORMAT, RunResult, StageReport
from mpq.runtime import choose_device
from mpq.sensitivity import METHODS, measure_sensitivity
from mpq.storage import Storage
from mpq.training import train
from mpq.training_folder import NEUTRAL, weight_options
from mpq.training_record import TRAINING_FORMAT


@dataclass(frozen=True)
class _Stage:
    """One stage.

    Attributes:
        after: The stages whose files it reads.
        inputs: All that its result depends on, as JSON; files of earlier stages may not be there yet.
        outputs: The files that are there when it is complete.
        act: Does it and returns its figures.
        folder: What is removed where another one's result, or a spoilt one, is in it; None: nothing.
    """

    name: str
    after: tuple[str, ...]
    inputs: Callable[[], Any]
    outputs: tuple[Path, ...]
    act: Callable[[], dict[str, Any]]
    folder: Path | None = None


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
    for stage in _stages(recipe, out, device, quiet):
        anew = [one.name for one in reports if one.name in stage.after and one.action != "skipped"]
        if dry_run and anew:
            reports.append(StageReport(stage.name, "run", f"reads what {' and '.join(anew)} will write", None, {}))
            say(f"{stage.name}: {reports[-1].reason}")
            continue
        version = [] if stage.name in ("train", "finetune") else [__version__]  # a week of training outlives an upgrade
        fingerprint = _fingerprint([version, stage.inputs()])
        known = record.get(stage.name, {})
        action, reason = _decide(known, fingerprint, stage, out)
        if action == "skipped" or dry_run:
            say(f"{stage.name}: {reason}" + ("; skipped" if action == "skipped" else ""))
            seconds, result = (known["seconds"], known["result"]) if action == "skipped" else (None, {})
            reports.append(StageReport(stage.name, action, reason, seconds, result))
            continue
        say(f"{stage.name}: {reason}")
        if stage.folder and known and action == "run":
            shutil.rmtree(stage.folder, ignore_errors=True)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MpqError(f"{out}: the folder cannot be made: {error.strerror}") from None
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
        }
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
    names = [*data.train, data.dev] if {"train", "finetune"} & stages else []
    names += data.test.values() if {"evaluate", "compare"} & stages else []
    names += [data.calibration or data.train[0]] if "sensitivity" in stages else []
    for name in dict.fromkeys(name for name in names if name):
        try:
            read_data(recipe.path(name))
        except MpqError as error:
            faults.append(str(error))
    tuning = recipe.finetune
    wanted = [("transcript_weight", data.train)] if tuning.transcript_weight else []
    wanted += [("select", [data.dev])] if tuning.select == "wer" else []
    for key, some in wanted if "finetune" in stages and not faults else []:
        if all(item.text is None for name in some if name for item in read_data(recipe.path(name))):
            value = json.dumps(getattr(tuning, key))
            faults.append(f"[finetune] {key}: {value} needs transcripts in {', '.join(map(str, some))}, which has none")
    try:
        _storage(recipe)
    except MpqError as error:
        faults.append(f"[sensitivity] {error}")
    if faults:
        raise MpqError("\n".join(faults))


def _storage(recipe: Recipe) -> Storage:
    """Returns the quantizer of a recipe."""
    options = recipe.sensitivity.model_dump(include={"scheme", "granularity", "clip", "rounding"}, exclude_none=True)
    return Storage.from_options(options)


def _read_record(path: Path) -> dict[str, Any]:
    """Returns what `run.json` says of each stage; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        stages = dict(read_json(path, RUN_FORMAT)["stages"])
        for known in stages.values():
            if "started" in known:
                float(known["started"]["seconds"]), str(known["started"]["fingerprint"])
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


def _decide(known: dict[str, Any], fingerprint: str, stage: _Stage, out: Path) -> tuple[str, str]:
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


def _fingerprint(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _stages(recipe: Recipe, out: Path, device: str, quiet: bool) -> list[_Stage]:
    """Returns the stages that the recipe names."""
    checkpoint = out / "train" if "train" in recipe.stages else Path(recipe.checkpoint or "")
    table, allocation = out / "sensitivity.json", out / "allocation.json"
    packed, tuned, tests = out / PACKED_FILE, out / "finetune", recipe.data.test
    calibration = recipe.path(recipe.data.calibration or (recipe.data.train or [""])[0])
    decode, is_tuned = DecodeOptions(**recipe.decode.model_dump()), "finetune" in recipe.stages
    common = {"device": device, "quiet": quiet}
    reading = {"channel": recipe.data.channel, "skip_bad": recipe.data.skip_bad}
    data = recipe.data

    def checkpoint_sha256() -> str:
        return sha256_file(model_file(checkpoint))

    def training_data() -> Any:
        names = [*data.train, *([data.dev] if data.dev else [])]
        return [_identity(recipe.path(name), by_time=False) for name in names]

    def train_inputs() -> Any:
        identity = training_data()
        return [TRAINING_FORMAT, recipe.seed, reading, data.max_seconds, weight_options(recipe), identity]

    def act_train() -> dict[str, Any]:
        done = train(recipe, checkpoint, **common)
        return {"dev_wer": done.dev_wer, "epochs": len(done.epochs), "parameters": done.parameters}

    def tests_identity() -> Any:
        return [reading, recipe.decode.model_dump(), {name: _identity(recipe.path(tests[name])) for name in tests}]

    def evaluate_all(model: Path, folder: Path) -> dict[str, Any]:
        done = {}
        for name, path in tests.items():
            done[name] = _figures(evaluate(model, recipe.path(path), folder / name, decode=decode, **reading, **common))
        return {"tests": done}

    def act_sensitivity() -> dict[str, Any]:
        options = recipe.sensitivity
        measured = measure_sensitivity(
            checkpoint,
            calibration,
            options.bits,
            table,
            _storage(recipe),
            method=options.method,
            output=options.output or ("decoder" if load_model(checkpoint).decoder_stages else "ctc"),
            max_seconds=options.seconds or METHODS[options.method],
            seed=recipe.seed,
            **reading,
            **common,
        )
        return {"layers": len(measured.layers)}

    def act_allocate() -> dict[str, Any]:
        options = recipe.allocate.model_dump()
        answer = allocate(SensitivityTable.load(table), **options)
        answer.save(allocation)
        return {"average_bits": answer.average_bits, "predicted_bytes": answer.predicted_bytes}

    def act_pack() -> dict[str, Any]:
        done = pack(checkpoint, packed, Allocation.load(allocation), device=device, quiet=quiet)
        return {"size_bytes": done.size_bytes, "float_bytes": done.float_bytes, "ratio": done.ratio}

    def act_finetune() -> dict[str, Any]:
        (size,) = finetune(checkpoint, [allocation], recipe, tuned, **common).sizes
        return {"size_bytes": size.size_bytes, "ratio": size.ratio, "dev_wer": size.wer}

    def compare_with(model: Path, what: str, prefix: str) -> dict[str, Any]:
        done = evaluate_all(model, out / what)["tests"]
        for name in tests:
            folders = out / "float" / name, out / what / name
            comparison = compare(
                *read_evaluations(*folders), names=("float32", what), alpha=recipe.compare.alpha, seed=recipe.seed
            )
            comparison.save(out / f"{prefix}-{name}.json")
            test = comparison.mapsswe
            done[name] |= {"lossless": comparison.lossless, "better": test.better, "p": test.p}
        return done

    def act_compare() -> dict[str, Any]:
        done = {"tests": compare_with(packed, "packed", "comparison")}
        if is_tuned:
            done["finetuned"] = compare_with(tuned / PACKED_FILE, "finetuned", "comparison-finetuned")
        return done

    def finetune_inputs() -> Any:
        options = recipe.finetune.model_dump(exclude=set(NEUTRAL))
        files = [checkpoint_sha256(), sha256_file(allocation)]
        return [
            *files,
            recipe.seed,
            reading,
            data.max_seconds,
            options,
            recipe.finetune_augment.model_dump(),
            training_data(),
        ]

    def sensitivity_inputs() -> Any:
        return [checkpoint_sha256(), recipe.sensitivity.model_dump(), recipe.seed, reading, _identity(calibration)]

    def compare_inputs() -> Any:
        done = [sha256_file(out / "float" / name / file) for name in tests for file in ("ref.trn", "hyp.trn")]
        files = [sha256_file(packed), *([sha256_file(tuned / PACKED_FILE)] if is_tuned else [])]
        return [*files, tests_identity(), recipe.compare.model_dump(), recipe.seed, done]

    trained = (checkpoint / MODEL_FILE, checkpoint / "training.json")
    compared = [*_evaluation_files(out / "packed", tests), *(out / f"comparison-{name}.json" for name in tests)]
    if is_tuned:
        compared += _evaluation_files(out / "finetuned", tests)
        compared += [out / f"comparison-finetuned-{name}.json" for name in tests]
    stages = [
        _Stage("train", (), train_inputs, trained, act_train),
        _Stage(
            "evaluate",
            ("train",),
            lambda: [checkpoint_sha256(), tests_identity()],
            _evaluation_files(out / "float", tests),
            lambda: evaluate_all(checkpoint, out / "float"),
        ),
        _Stage("sensitivity", ("train",), sensitivity_inputs, (table,), act_sensitivity),
        _Stage(
            "allocate",
            ("sensitivity",),
            lambda: [sha256_file(table), recipe.allocate.model_dump()],
            (allocation,),
            act_allocate,
        ),
        _Stage(
            "pack", ("train", "allocate"), lambda: [checkpoint_sha256(), sha256_file(allocation)], (packed,), act_pack
        ),
        _Stage(
            "finetune",
            ("train", "allocate"),
            finetune_inputs,
            (tuned / PACKED_FILE, tuned / RESULT_FILE),
            act_finetune,
            tuned,
        ),
        _Stage("compare", ("evaluate", "pack", "finetune"), compare_inputs, tuple(compared), act_compare),
    ]
    return [stage for stage in stages if stage.name in recipe.stages]


def _evaluation_files(folder: Path, tests: dict[str, str]) -> tuple[Path, ...]:
    return tuple(folder / name / file for name in tests for file in ("ref.trn", "hyp.trn", "metrics.json"))


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    metrics = evaluation.metrics
    return {
        "wer": metrics.wer,
        "words": metrics.words,
        "sub": metrics.substitutions,
        "del": metrics.deletions,
        "ins": metrics.insertions,
    }


def _identity(path: Path, by_time: bool = True) -> str:
    """Returns a digest of a manifest or Kaldi directory: what it says, and size (and time of change) of the audio."""
    digest = hashlib.sha256()
    for item in read_data(path):
        parts: list[Any] = [item.utt_id, str(item.audio_path), item.text, item.offset, item.duration]
        if item.audio_path.exists():
            stat = item.audio_path.stat()
            parts += [stat.st_size, *([stat.st_mtime_ns] if by_time else [])]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()
