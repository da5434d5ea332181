"""Quantization-aware fine-tuning of a trained model at the bit-widths of an allocation (`mpq finetune`).

The folder holds `packed.safetensors` (the packed artifact; with several allocations, a `packed-NAME.safetensors` for
each), `float.safetensors` (the weights before rounding, a float checkpoint), `recipe.json` (all options, the seed),
`log.jsonl` (a line for each update and epoch), `learning_curve.svg` (where matplotlib is installed) and
`finetune.json` (the result). While it runs, `state.pt` is where it goes on after an interruption, and `epochs/` has
what may be kept; epoch 0 is the start. The weights that are trained are the weights in the file, bit for bit.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from mpq.allocation.assignment import assign, recall, recalled_statistics
from mpq.allocation.records import Allocation
from mpq.artifact.parts import exact_names, fold_as_stored
from mpq.artifact.weights import WeightFormat
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import make_folder
from mpq.finetuning.fake_quant import OPTIONS, QuantizedWeights, check_scales
from mpq.finetuning.loop import FLOAT_FILE, RESULT_FILE, Finetuner, Target
from mpq.finetuning.record import FINETUNE_FORMAT, FinetuneResult
from mpq.identity import Inputs, options_of
from mpq.loading import PACKED_FILE, OpenedModel, open_float_model
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE
from mpq.quantization.spec import FLOAT_BITS
from mpq.runtime import choose_device, processes
from mpq.sensitivity.calibration import CALIBRATION_SECONDS, CalibrationData, draw
from mpq.training.data import TrainingSet, read_set
from mpq.training.folder import check_folder, is_finished, used_data
from mpq.training.loop import Job, NotFiniteError


def finetune(
    checkpoint: Path,
    allocations: Sequence[Path],
    recipe: Recipe,
    out: Path,
    *,
    calibration: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes a model and writes the folder `out`; an interrupted fine-tuning goes on.

    Args:
        checkpoint: The float model.
        allocations: Files of `mpq.allocation/1`.
        recipe: The recipe with the data (train and dev), the options, the augmentation and the seed.
        out: The folder.
        calibration: The audio that the allocations were made with, if it was moved since.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
        quiet: Show no progress.

    Raises:
        MpqError: Bad input of any kind; a folder that holds another training; a loss that is not finite, with the
            update and the layer. The best weights until then are packed all the same.
    """
    out, where = Path(out), choose_device(device)
    opened = open_float_model(checkpoint, where, "fine-tune")
    if len(opened.model.heads) == 1:  # nothing else has a loss
        recipe = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"ctc_weight": 1.0})})
    loaded = _allocations(allocations)
    targets = _targets(opened, loaded, out)
    fold_as_stored(opened.model, targets[0].assigned.weight_format)
    _check_options(recipe, opened.model, targets[0].assigned.weight_format)
    data, dev = _data(recipe, opened.model)
    inputs = _inputs(recipe, opened.sha256, targets, data, dev)
    make_folder(out)
    packed = [target.path.name for target in targets]
    check_folder(out, inputs, RESULT_FILE, FINETUNE_FORMAT, [MODEL_FILE, FLOAT_FILE, *packed])
    with processes(where) as workers:
        if is_finished(out, [RESULT_FILE, *packed], workers.rank):
            return FinetuneResult.load(out / RESULT_FILE)
        grams = _statistics(opened, targets, loaded, recipe, calibration, out, quiet or workers.rank > 0)
        job = Job(
            model=copy.deepcopy(opened.model),
            data=data,
            options=recipe.finetune,
            augment=recipe.finetune_augment,
            channel=recipe.data.channel,
            seed=recipe.seed,
            out=out,
            inputs=inputs,
            workers=workers,
            quiet=quiet,
        )
        weights = _weights(opened.model, targets, grams, recipe).to(where)
        tuner = Finetuner(job, recipe, opened.model, weights, targets, dev)
        try:
            tuner.run()
        except NotFiniteError as error:
            raise MpqError(f"{error}; {tuner.keep_best()}") from None
        return tuner.finish({"path": str(opened.path), "sha256": opened.sha256}, _transcribed(data))


def _allocations(paths: Sequence[Path]) -> dict[Path, Allocation]:
    """Returns the allocations in files, whose names have to differ: the artifacts are named after them."""
    names = [path.stem for path in paths]
    for path in paths:
        if names.count(path.stem) > 1:
            raise MpqError(f"{path}: another allocation is named {path.stem} too; rename one of the files")
    return {path: Allocation.load(path) for path in paths}


def _check_options(recipe: Recipe, teacher: AsrModel, weight_format: WeightFormat) -> None:
    """Raises MpqError for options of [finetune] that do nothing, or too much, for this model and its quantizer."""
    options, spec = recipe.finetune, weight_format.spec
    check_scales(spec, options.scales)
    if options.rate_weight and not spec.record.is_entropy_coded:
        raise MpqError(
            f"finetune.rate_weight: does nothing for the scheme {spec.scheme} of the allocation, the size of which "
            "follows from its widths; leave it out"
        )
    for training, keys in OPTIONS.items():
        if training != spec.record.training and (given := options.model_fields_set & set(keys)):
            raise MpqError(
                f"finetune.{min(given)}: does nothing for the scheme {spec.scheme} of the allocation; leave it out"
            )
    statistics = {name for name in exact_names(teacher, weight_format) if "running_" in name}
    if options.batch_norm == "updated" and statistics:
        raise MpqError(
            f'finetune.batch_norm: "updated" would change {sorted(statistics)[0]}, which half precision spoils, so '
            'the file would not have the promised size; use "frozen", or allocate with --rest-dtype float32'
        )


def _data(recipe: Recipe, teacher: AsrModel) -> tuple[TrainingSet, TrainingSet]:
    """Returns the training data and the held-out data.

    Raises:
        MpqError: Bad data; no transcripts where the options need some.
    """
    options, fastest = recipe.finetune, max(recipe.finetune_augment.speed)
    texts: Literal["used", "ignored"] = "used" if options.transcript_weight else "ignored"
    data = read_set(recipe.data.train, recipe.data, teacher, fastest, is_training=True, texts=texts)
    if options.transcript_weight and not _transcribed(data):
        raise MpqError(
            f"finetune.transcript_weight: {options.transcript_weight:g} needs transcripts, and none of the "
            f"{len(data.utterances)} training utterances has one; give 0 for distillation alone"
        )
    assert recipe.data.dev is not None, "the recipe was checked"
    dev = read_set([recipe.data.dev], recipe.data, teacher, 1.0, is_training=False, texts="ignored")
    if options.select == "wer" and not _transcribed(dev):
        raise MpqError('finetune.select: "wer" needs transcripts in the held-out data; give them, or choose "loss"')
    return data, dev


def _transcribed(data: TrainingSet) -> int:
    """Returns the number of utterances with a transcript."""
    return sum(item.text is not None for item in data.utterances)


def _targets(opened: OpenedModel, loaded: dict[Path, Allocation], out: Path) -> list[Target]:
    """Returns a target for each allocation, the largest first.

    Raises:
        MpqError: An allocation that does not fit the model or quantizes nothing; several that do not go together.
    """
    found = []
    for path, allocation in loaded.items():
        weight_format = WeightFormat.from_json(allocation.quantizer)
        packed = out / (PACKED_FILE if len(loaded) == 1 else f"packed-{path.stem}.safetensors")
        try:
            assigned = assign(opened.model, opened.path, opened.sha256, allocation, weight_format, packed)
        except MpqError as error:
            raise MpqError(f"{path}: {str(error).removeprefix(f'{packed}: ')}") from None
        if all(bits in FLOAT_BITS for bits in assigned.bits.values()):
            raise MpqError(f"{path}: quantizes no layer, so there is nothing to train")
        found.append(Target(path.stem, assigned, packed))
    for target in found:
        if target.assigned.weight_format != found[0].assigned.weight_format:
            quantizers = [one.assigned.weight_format.to_json() for one in (found[0], target)]
            raise MpqError(
                f"allocations {found[0].name} and {target.name}: expected one quantizer, got {quantizers[0]} and "
                f"{quantizers[1]}; allocate both from one sensitivity file"
            )
    audio = {json.dumps(allocation.data.get("sha256")) for allocation in loaded.values()}
    if len(audio) > 1 and found[0].assigned.weight_format.spec.needs_statistics:
        raise MpqError(
            f"allocations {found[0].name} and {found[-1].name}: made with different calibration audio; allocate all "
            "from one sensitivity file"
        )
    return sorted(found, key=lambda target: -(target.assigned.size_bytes or 0))


def _statistics(
    opened: OpenedModel,
    targets: Sequence[Target],
    loaded: dict[Path, Allocation],
    recipe: Recipe,
    calibration: Path | None,
    out: Path,
    quiet: bool,
) -> dict[str, Tensor]:
    """Returns the statistics that the rounding at the start needs; none where it needs none.

    Raises:
        MpqError: Audio that is not needed, or not the audio that the allocations were made with.
    """
    is_needed = any(target.assigned.needs_statistics for target in targets) and recipe.finetune.scales != "recomputed"
    if not is_needed:
        if calibration is not None:
            raise MpqError(f"--data {calibration}: the start is rounded to nearest, which needs no audio; leave it out")
        return {}
    model, allocation = opened.model, next(iter(loaded.values()))
    drawn: CalibrationData | None
    if calibration is not None and "sha256" not in allocation.data:  # written by hand or by another tool
        note, drawn = "", draw(model, calibration, CALIBRATION_SECONDS, recipe.seed, recipe.data.channel)
    else:
        drawn, note = recall(model, allocation, calibration)
    weight_format = targets[0].assigned.weight_format
    return recalled_statistics(model, opened.sha256, drawn, allocation, weight_format, note, out, quiet)


def _weights(
    teacher: AsrModel, targets: Sequence[Target], grams: dict[str, Tensor], recipe: Recipe
) -> QuantizedWeights:
    """Returns the weights at the start of the training."""
    state = teacher.state_dict()
    trained = {ref.name: state[ref.name].cpu() for ref in teacher.weights()}
    allocations = [target.assigned.bits for target in targets]
    return QuantizedWeights(trained, allocations, targets[0].assigned.weight_format, grams, recipe.finetune.scales)


def _inputs(recipe: Recipe, sha256: str, targets: Sequence[Target], data: TrainingSet, dev: TrainingSet) -> Inputs:
    """Returns all that the trained weights depend on."""
    return Inputs.of(
        format=FINETUNE_FORMAT,
        checkpoint=sha256,
        seed=recipe.seed,
        data=used_data(recipe, data, dev),
        finetune=options_of(recipe.finetune),
        finetune_augment=options_of(recipe.finetune_augment),
        allocations={
            one.name: {
                "bits": one.assigned.bits,
                "quantizer": one.assigned.weight_format.to_json(),
                "size_bytes": one.assigned.size_bytes,
            }
            for one in targets
        },
    )
