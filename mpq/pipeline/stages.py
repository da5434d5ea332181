"""What each stage of a recipe does and depends on, in the folder of `mpq run`.

The *baseline* is the trained float model: that of the stage train, or the recipe's checkpoint. What is quantized is the
model that the stage search has found, if there is one, else the baseline. A search from scratch without a baseline is
its own: its model is what the packed ones are compared with.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.config import Recipe
from mpq.files import sha256_file
from mpq.finetuning.loop import RESULT_FILE
from mpq.finetuning.run import finetune
from mpq.loading import PACKED_FILE, load_model, model_file
from mpq.models.checkpoint import MODEL_FILE, is_checkpoint
from mpq.scoring.compare import compare, read_evaluations
from mpq.scoring.evaluate import Evaluation, evaluate
from mpq.search.record import SEARCH_FORMAT, SearchResult
from mpq.search.run import RESULT_FILE as SEARCH_FILE
from mpq.search.run import search
from mpq.sensitivity.measure import METHODS, measure_sensitivity
from mpq.sensitivity.records import SensitivityTable
from mpq.speech.decoding import DecodeOptions
from mpq.speech.manifests import read_data
from mpq.training.folder import NEUTRAL, weight_options
from mpq.training.objectives import IMITATION_OPTIONS
from mpq.training.record import TRAINING_FORMAT
from mpq.training.run import train

SUPERNET_OPTIONS = ("space", "ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank", "supernet_epochs", "loss")
"""Of [search], what the training of the supernet depends on."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        after: The stages whose files it reads.
        inputs: All that its result depends on, as JSON; files of earlier stages may not be there yet.
        outputs: The files that are there when it is complete.
        act: Does it and returns its figures.
        folder: What is removed where another one's result, or a spoilt one, is in it; None: nothing.
        kept: What in that folder has inputs of its own, and stays where these are unchanged, by name.
    """

    name: str
    after: tuple[str, ...]
    inputs: Callable[[], Any]
    outputs: tuple[Path, ...]
    act: Callable[[], dict[str, Any]]
    folder: Path | None = None
    kept: dict[str, Callable[[], Any]] = field(default_factory=dict)


def stages_of(recipe: Recipe, out: Path, device: str, quiet: bool) -> list[Stage]:
    """Returns the stages that the recipe names."""
    baseline = out / "train" if "train" in recipe.stages else recipe.checkpoint and Path(recipe.checkpoint)
    is_searched, found = "search" in recipe.stages, out / "search"
    checkpoint, maker = (found, "search") if is_searched else (Path(baseline or ""), "train")
    reference = baseline or checkpoint
    table, allocation = out / "sensitivity.json", out / "allocation.json"
    packed, tuned, tests = out / PACKED_FILE, out / "finetune", recipe.data.test
    calibration = recipe.path(recipe.data.calibration or (recipe.data.train or [""])[0])
    decode, is_tuned = DecodeOptions(**recipe.decode.model_dump()), "finetune" in recipe.stages
    common = {"device": device, "quiet": quiet}
    reading = {"channel": recipe.data.channel, "skip_bad": recipe.data.skip_bad}
    data = recipe.data

    def checkpoint_sha256() -> str:
        return sha256_file(model_file(checkpoint))

    def reference_sha256() -> str:
        return sha256_file(model_file(reference))

    def training_data() -> Any:
        names = [*data.train, *([data.dev] if data.dev else [])]
        return [_identity(recipe.path(name), by_time=False) for name in names]

    def train_inputs() -> Any:
        identity = training_data()
        return [TRAINING_FORMAT, recipe.seed, reading, data.max_seconds, weight_options(recipe), identity]

    def act_train() -> dict[str, Any]:
        done = train(recipe, out / "train", **common)
        return {"dev_wer": done.dev_wer, "epochs": len(done.epochs), "parameters": done.parameters}

    start = out / "train" / MODEL_FILE if recipe.search.trained else recipe.checkpoint

    def supernet_inputs() -> Any:
        options = recipe.search.model_dump(include=set(SUPERNET_OPTIONS))
        inputs = [SEARCH_FORMAT, *train_inputs(), options]
        if start is not None:
            inputs += [sha256_file(model_file(start)), _identity(calibration, by_time=False)]
        if options["loss"] == "distillation" or (
            options["loss"] is None and recipe.checkpoint and load_model(recipe.checkpoint).family != "mpq"
        ):
            inputs.append(recipe.finetune.model_dump(include=IMITATION_OPTIONS))
        return inputs

    def search_inputs() -> Any:
        held_out = _identity(recipe.path(recipe.search.held_out or data.dev or ""), by_time=False)
        return [supernet_inputs(), recipe.search.model_dump(exclude={"supernet"}, exclude_defaults=True), held_out]

    def act_search() -> dict[str, Any]:
        begun = recipe.model_copy(update={"checkpoint": start and str(start)})
        return _search_figures(search(begun, found, **common), found / MODEL_FILE, baseline)

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
            quantizer(recipe),
            method=options.method,
            output=options.output or max(load_model(checkpoint).output_heads, key=lambda one: one.needs_tokens).output,
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

    compared = {"tests": (packed, "packed", "comparison")}
    if is_searched and baseline:
        compared["searched"] = (found / MODEL_FILE, "searched", "comparison-searched")
    if is_tuned:
        compared["finetuned"] = (tuned / PACKED_FILE, "finetuned", "comparison-finetuned")

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
        files = [sha256_file(model) for model, _, _ in compared.values()]
        return [*files, tests_identity(), recipe.compare.model_dump(), recipe.seed, done]

    trained = (out / "train" / MODEL_FILE, out / "train" / "training.json")
    comparisons = [
        path
        for _, what, prefix in compared.values()
        for path in (*_evaluation_files(out / what, tests), *(out / f"{prefix}-{name}.json" for name in tests))
    ]
    stages = [
        Stage("train", (), train_inputs, trained, act_train),
        Stage(
            "search",
            ("train",) if recipe.search.trained else (),
            search_inputs,
            (found / MODEL_FILE, found / SEARCH_FILE),
            act_search,
            found,
            {"supernet": supernet_inputs},
        ),
        Stage(
            "evaluate",
            ("train",) if baseline else ("search",),
            lambda: [reference_sha256(), tests_identity()],
            _evaluation_files(out / "float", tests),
            lambda: evaluate_all(reference, out / "float"),
        ),
        Stage("sensitivity", (maker,), sensitivity_inputs, (table,), act_sensitivity),
        Stage(
            "allocate",
            ("sensitivity",),
            lambda: [sha256_file(table), recipe.allocate.model_dump()],
            (allocation,),
            act_allocate,
        ),
        Stage("pack", (maker, "allocate"), lambda: [checkpoint_sha256(), sha256_file(allocation)], (packed,), act_pack),
        Stage(
            "finetune",
            (maker, "allocate"),
            finetune_inputs,
            (tuned / PACKED_FILE, tuned / RESULT_FILE),
            act_finetune,
            tuned,
        ),
        Stage(
            "compare",
            ("search", "evaluate", "pack", "finetune"),
            compare_inputs,
            tuple(comparisons),
            lambda: {key: compare_with(*one) for key, one in compared.items()},
        ),
    ]
    return [stage for stage in stages if stage.name in recipe.stages]


def _evaluation_files(folder: Path, tests: dict[str, str]) -> tuple[Path, ...]:
    return tuple(folder / name / file for name in tests for file in ("ref.trn", "hyp.trn", "metrics.json"))


def _search_figures(result: SearchResult, file: Path, baseline: Path | None) -> dict[str, Any]:
    """Returns the figures of a search: parameters, widths (and ranks) of each block, true sizes."""
    architecture, done = result.architecture, result.training
    shapes, size = architecture.shapes(), os.path.getsize(file)
    figures = {
        "dev_wer": done.dev_wer,
        "parameters": {"found": done.parameters["total"], "largest": round(1e6 * architecture.largest_millions)},
        "widths": [[width for width, _ in block] for block in shapes],
    }
    if any(rank for block in shapes for _, rank in block):
        figures["ranks"] = [[rank for _, rank in block] for block in shapes]
    figures["size_bytes"] = size
    if baseline is not None:
        figures["baseline_bytes"] = _float_bytes(model_file(baseline))
        figures["ratio"] = figures["baseline_bytes"] / size
    return figures


def _float_bytes(file: Path) -> int:
    """Returns the size of a checkpoint in float32: of an archive of another framework, that of its parameters."""
    if is_checkpoint(file):
        return os.path.getsize(file)
    return 4 * load_model(file).parameter_counts()["total"]


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


def quantizer(recipe: Recipe) -> WeightFormat:
    """Returns the quantizer of a recipe."""
    options = recipe.sensitivity.model_dump(include={"scheme", "granularity", "clip", "rounding"}, exclude_none=True)
    return WeightFormat.from_options(options)
