"""Architecture search over the feed-forward modules of the encoder, in three phases (`mpq search`; Li et al. 2023).

1. `supernet/`: the network of the largest candidates is trained, in each update as one architecture drawn uniformly.
2. `architecture/`: its weights stay, and the logits of the candidates are trained on held-out data.
3. The folder itself: the most probable architecture is cut out of the supernet and trained on.

From scratch the supernet is the recipe's model. From a trained checkpoint, the hidden units are put into the order of
their importance first, so that a candidate keeps the useful ones, and the ranks are those of a singular value
decomposition.

The folder is a checkpoint folder like that of `mpq train`, with `search.json` (the whole search), `recipe.toml` (the
model that was found, for the stages that follow) and `architecture.svg` (its widths, where matplotlib is installed).
Each phase can be interrupted, and goes on where it was.
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from mpq.config import AugmentConfig, Recipe, TrainConfig
from mpq.errors import MpqError
from mpq.files import digest, make_folder, write_json, write_text
from mpq.loading import open_float_model
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, read_checkpoint
from mpq.models.reshaping import FfnShapes, sliced
from mpq.runtime import choose_device, processes
from mpq.search.figure import draw_architecture
from mpq.search.importance import order_units, unit_importance
from mpq.search.loop import ARCHITECTURE_FILE, ArchitectureSearch, loop_options
from mpq.search.low_rank import factored
from mpq.search.record import ARCHITECTURE_FORMAT, SEARCH_FORMAT, Architecture, SearchResult
from mpq.search.space import SearchSpace, search_space
from mpq.search.supernet import Supernet, budget
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.statistics import input_grams
from mpq.speech.manifests import read_data
from mpq.speech.text import train_tokenizer
from mpq.training.building import build_model, encoder_options
from mpq.training.data import TrainingSet, read_set, read_transcripts
from mpq.training.folder import NEUTRAL, check_folder, clean_up, data_identity, finished_training, weight_options
from mpq.training.loop import Job
from mpq.training.objectives import IMITATION_OPTIONS, Imitation, Objective, Transcripts
from mpq.training.record import TRAINING_FORMAT, TrainingResult
from mpq.training.weights import WeightTrainer

RESULT_FILE = "search.json"
RECIPE_FILE = "recipe.toml"
FIGURE_FILE = "architecture.svg"
STATISTICS_SECONDS = 60.0
"""Of data.calibration, else the first of data.train, that importance and ranks of a trained model are measured on."""


@dataclass(frozen=True)
class _Start:
    """What the search begins with.

    Attributes:
        model: Of the recipe, untrained, or the trained one.
        checkpoint: {"path", "sha256"} of the trained one; None: from scratch.
        space: The candidates.
        is_imitating: Whether the trained model is the teacher.
        most_parameters: That the architecture may have; None: any number.
    """

    model: AsrModel
    checkpoint: dict[str, str] | None
    space: SearchSpace
    is_imitating: bool
    most_parameters: int | None

    @property
    def largest(self) -> FfnShapes:
        return [tuple(module.largest for module in block) for block in self.space]


def search(recipe: Recipe, out: Path, *, device: str = "auto", quiet: bool = False) -> SearchResult:
    """Searches the architecture that a recipe's [search] asks for, and trains it; an interrupted search goes on.

    Args:
        recipe: Says data, model (or checkpoint), training and search.
        out: The folder.
        device: As in `mpq.runtime.choose_device`.
        quiet: Show no progress.

    Raises:
        MpqError: Bad data or options; a folder that holds something else; a loss that is not finite, with the batch.
    """
    out, where = Path(out), choose_device(device)
    start = _start(recipe, where)
    if len(start.model.heads) == 1:  # nothing else has a loss
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"ctc_weight": 1.0})})
    options, data = recipe.search, recipe.data
    texts = "ignored" if start.is_imitating else "needed"
    training = read_set(data.train, data, start.model, max(recipe.augment.speed), is_training=True, texts=texts)
    dev = read_set([data.dev], data, start.model, 1.0, is_training=False, texts=texts) if data.dev else None
    held_out_name = options.held_out or data.dev
    assert held_out_name is not None, "the recipe was checked"
    held_out = read_set([held_out_name], data, start.model, 1.0, is_training=False, texts=texts)

    train = recipe.train
    epochs = options.supernet_epochs or (train.epochs if start.checkpoint is None else max(1, train.epochs // 3))
    first = recipe.model_copy(update={"train": train.model_copy(update={"epochs": epochs})})
    final = train.model_copy(
        update={
            "epochs": max(1, train.epochs // 2) if options.final_epochs is None else options.final_epochs,
            "learning_rate": options.final_learning_rate or train.learning_rate / 2,
        }
    )
    last = recipe.model_copy(update={"train": final})

    supernet_folder = Path(options.supernet) if options.supernet else out / "supernet"
    architecture_folder = out / "architecture"
    for folder in (out, supernet_folder, architecture_folder):
        make_folder(folder)
    common = [SEARCH_FORMAT, recipe.seed, data.channel, start.is_imitating]
    common += [recipe.finetune.model_dump(include=IMITATION_OPTIONS)] if start.is_imitating else []
    supernet_key = _key(
        [*common, weight_options(first), start.checkpoint and start.checkpoint["sha256"], _listed(start.space)],
        [*data_identity(training, dev), *_statistics_identity(recipe)],
    )
    choice = options.model_dump(
        include={"eta", "target_millions", "method", "temperature", "epochs", "learning_rate", "noise_seed"},
        exclude_defaults=True,
    )
    loop = loop_options(options, train)
    architecture_key = _key(
        [*common, supernet_key, choice, loop.model_dump(exclude=set(NEUTRAL))], data_identity(held_out)
    )
    final_key = _key([architecture_key, weight_options(last)], [])
    shared = f"choose another --out, and --supernet {supernet_folder} to share the supernet; or delete the folder"
    check_folder(supernet_folder, supernet_key, remedy="choose another --supernet (or --out), or delete the folder")
    check_folder(architecture_folder, architecture_key, ARCHITECTURE_FILE, ARCHITECTURE_FORMAT, (), shared)
    check_folder(out, final_key, models=(MODEL_FILE, RECIPE_FILE), remedy=shared)

    with processes(where) as workers:
        job = Job(
            model=start.model,
            data=training,
            options=first.train,
            augment=recipe.augment,
            channel=data.channel,
            seed=recipe.seed,
            out=supernet_folder,
            fingerprint=supernet_key,
            workers=workers,
            quiet=quiet,
        )
        phases = _Phases(recipe, start, job, quiet or workers.rank > 0)
        supernet_training = phases.train_supernet(first, dev)
        architecture = phases.choose(architecture_folder, architecture_key, held_out, loop)
        done = phases.train_found(out, final_key, last, dev, architecture)
        result = SearchResult(
            checkpoint=start.checkpoint,
            space=options.space,
            method=options.method,
            eta=options.eta,
            target_millions=options.target_millions,
            supernet=str(supernet_folder),
            supernet_seconds=supernet_training.seconds,
            architecture=architecture,
            training=done,
        )
        if workers.rank == 0 and not (out / RESULT_FILE).exists():
            write_text(out / RECIPE_FILE, found_recipe(recipe, architecture.shapes()))
            draw_architecture(out / FIGURE_FILE, architecture, quiet)
            write_json(out / RESULT_FILE, result.to_json())
        workers.barrier()
        return result


def _start(recipe: Recipe, where: torch.device) -> _Start:
    """Returns the model that the search begins with, and its candidates."""
    options, imitates = recipe.search, recipe.search.loss == "distillation"

    def most(model: AsrModel, space: SearchSpace) -> int | None:
        return None if options.target_millions is None else budget(model, space, options.target_millions)

    if recipe.checkpoint is None:
        tokenizer = train_tokenizer(recipe.tokens.type, read_transcripts(recipe.data), recipe.tokens.vocabulary_size)
        own = encoder_options(recipe)
        space = search_space(options, own.ffn_shapes(), own.width, is_trained=False)
        largest = own.with_ffn_shapes([tuple(module.largest for module in block) for block in space])
        torch.manual_seed(recipe.seed)
        keys = ("ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank")
        model = recipe.model.model_copy(update={key: getattr(largest, key) for key in keys})
        untrained = build_model(recipe.model_copy(update={"model": model}), tokenizer).to(where)
        return _Start(untrained, None, space, imitates, most(untrained, space))
    opened = open_float_model(recipe.checkpoint, where, "search")
    path, model, sha256 = opened.path, opened.model, opened.sha256
    if options.loss is None:
        imitates = model.family != "mpq"
    if len(model.heads) > 1 and not imitates and recipe.train.ctc_weight == 1:
        raise MpqError("[train] ctc_weight: 1 would leave the decoder untrained; give less, as with --set")
    own = model.encoder.options
    try:
        space = search_space(options, own.ffn_shapes(), own.width, is_trained=True)
    except MpqError as error:
        raise MpqError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return _Start(model, {"path": str(path), "sha256": sha256}, space, imitates, most(model, space))


class _Phases:
    """The three phases.

    Args:
        recipe: The user's.
        start: What the search begins with.
        job: Of the first phase.
        quiet: Say nothing.
    """

    def __init__(self, recipe: Recipe, start: _Start, job: Job, quiet: bool) -> None:
        self.recipe, self.start, self.job, self.quiet = recipe, start, job, quiet
        self.supernet_file = job.out / MODEL_FILE

    def train_supernet(self, recipe: Recipe, dev: TrainingSet | None) -> TrainingResult:
        """Returns the result of the first phase."""
        job = self.job
        if done := finished_training(job.out, job.workers.rank):
            self._say("1 of 3, the supernet: done")
            return done
        self._say("1 of 3, the supernet")
        model = self._prepared()
        supernet = Supernet(model, self.start.space)

        def sample(step: int | None) -> None:
            if step is None:
                supernet.be_whole()
            else:
                supernet.be_sampled(job.seed, step)

        trainer = WeightTrainer(replace(job, model=model), recipe, self._objective(model, recipe.train), dev, sample)
        return trainer.train()

    def choose(self, out: Path, fingerprint: str, held_out: TrainingSet, options: Any) -> Architecture:
        """Returns the result of the second phase."""
        if (out / ARCHITECTURE_FILE).exists():
            self._say("2 of 3, the architecture: done")
            if self.job.workers.rank == 0:
                clean_up(out)
            return Architecture.load(out / ARCHITECTURE_FILE)
        self._say("2 of 3, the architecture")
        model = read_checkpoint(self.supernet_file).to(self._device())
        supernet = Supernet(model, self.start.space)
        job = replace(
            self.job,
            model=model,
            data=held_out,
            options=options,
            augment=AugmentConfig(frequency_masks=0, time_masks=0),
            seed=self.job.seed if (drawn := self.recipe.search.noise_seed) is None else drawn,
            out=out,
            fingerprint=fingerprint,
        )
        objective = self._objective(model, self.recipe.train)
        return ArchitectureSearch(job, self.recipe.search, objective, supernet, self.start.most_parameters).choose()

    def train_found(
        self, out: Path, fingerprint: str, recipe: Recipe, dev: TrainingSet | None, found: Architecture
    ) -> TrainingResult:
        """Returns the result of the third phase."""
        job = replace(self.job, options=recipe.train, out=out, fingerprint=fingerprint)
        if done := finished_training(out, job.workers.rank):
            self._say("3 of 3, the model found: done")
            return done
        self._say(f"3 of 3, the model found: {found.millions:.3f} of {found.largest_millions:.3f} M parameters")
        model = sliced(read_checkpoint(self.supernet_file).to(self._device()), found.shapes())
        return WeightTrainer(replace(job, model=model), recipe, self._objective(model, recipe.train), dev).train()

    def _prepared(self) -> AsrModel:
        """Returns the model of the largest candidates: untrained, or cut out of the trained one."""
        model, recipe = self.start.model, self.recipe
        if self.start.checkpoint is None:
            return model
        model = copy.deepcopy(model)
        source = _statistics_source(recipe)
        audio = draw(model, source, STATISTICS_SECONDS, recipe.seed, recipe.data.channel, skip_bad=recipe.data.skip_bad)
        data = one_by_one(model, audio)
        order_units(model, unit_importance(model, input_grams(model, data)))
        own, largest = model.encoder.options.ffn_shapes(), self.start.largest
        model = sliced(
            model,
            [
                tuple((wide[0], was[1]) for was, wide in zip(*pair, strict=True))
                for pair in zip(own, largest, strict=True)
            ],
        )
        ranks = [tuple(rank for _, rank in block) for block in largest]
        if self.recipe.search.space != "widths":
            model = factored(model, ranks, input_grams(model, data))
        return model

    def _objective(self, model: AsrModel, options: TrainConfig) -> Objective:
        channel, workers = self.recipe.data.channel, self.job.workers
        if not self.start.is_imitating:
            return Transcripts(model, options, channel, workers)
        return Imitation(model, self.start.model, self.recipe.finetune, channel, workers)

    def _device(self) -> torch.device:
        return next(self.start.model.parameters()).device

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"mpq search: phase {text}", file=sys.stderr, flush=True)


def _statistics_source(recipe: Recipe) -> Path:
    """Returns the audio that importance and ranks of a trained model are measured on."""
    return recipe.path(recipe.data.calibration or recipe.data.train[0])


def _statistics_identity(recipe: Recipe) -> list[Any]:
    """Returns what tells this audio from other; nothing for a search from scratch."""
    if recipe.checkpoint is None:
        return []
    found = read_data(_statistics_source(recipe))
    return [(item.utt_id, item.offset, item.duration, item.audio_path.stat().st_size) for item in found]


def _listed(space: SearchSpace) -> list[Any]:
    return [[(module.widths, module.ranks) for module in block] for block in space]


def _key(work: list[Any], data: list[Any]) -> str:
    return digest([TRAINING_FORMAT, *work, data])


def found_recipe(recipe: Recipe, shapes: FfnShapes) -> str:
    """Returns the TOML of a recipe for the stages that follow a search, on the model that it found."""
    table = recipe.model_dump(exclude_defaults=True, exclude_none=True, exclude={"search"})
    header = "# The model that mpq search found, beside this file, for the stages that follow.\n"
    if recipe.checkpoint is None or "model" in table:
        columns = zip(*([*first, *second] for first, second in shapes), strict=True)
        keys = ("ffn_width", "ffn_rank", "ffn2_width", "ffn2_rank")
        table["model"] = table.get("model", {}) | dict(zip(keys, map(list, columns), strict=True))
        header += "# To train its architecture anew: leave out checkpoint, and name train among the stages.\n"
    later = [stage for stage in recipe.stages if stage not in ("train", "search")]
    table["stages"] = later or [stage for stage in Recipe().stages if stage != "train"]
    table["checkpoint"] = MODEL_FILE
    order = sorted(table, key=lambda key: isinstance(table[key], dict))  # keys of no section come first
    return header + "\n" + tomli_w.dumps({key: table[key] for key in order})
