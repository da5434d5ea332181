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

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tomli_w

from mpq.config import LoopConfig, Recipe
from mpq.files import make_folder, write_json, write_text
from mpq.identity import Inputs, data_identity, options_of
from mpq.models.checkpoint import MODEL_FILE
from mpq.models.reshaping import FfnShapes
from mpq.runtime import choose_device, processes
from mpq.search.figure import draw_architecture
from mpq.search.loop import ARCHITECTURE_FILE, loop_options
from mpq.search.phases import Phases
from mpq.search.record import ARCHITECTURE_FORMAT, SEARCH_FORMAT, SearchResult
from mpq.search.start import Start, search_start
from mpq.speech.manifests import read_data
from mpq.training.data import TrainingSet, read_set
from mpq.training.folder import check_folder, used_data, weight_options
from mpq.training.loop import Job
from mpq.training.objectives import IMITATION_OPTIONS
from mpq.training.record import TRAINING_FORMAT

RESULT_FILE = "search.json"
RECIPE_FILE = "recipe.toml"
FIGURE_FILE = "architecture.svg"
CHOICE_OPTIONS = ("eta", "target_millions", "method", "temperature", "epochs", "learning_rate", "noise_seed")
"""The options of [search] that the second phase reads."""


@dataclass(frozen=True)
class _Data:
    """The data of the first and third phase (`train`, `dev`), and of the second (`held_out`)."""

    train: TrainingSet
    dev: TrainingSet | None
    held_out: TrainingSet


@dataclass(frozen=True)
class _Plan:
    """Recipe (or options), folder and inputs of each phase.

    Attributes:
        first, loop, last: Recipes (or options) of the training of the supernet, of the logits and of the model found.
        supernet, architecture, out: The folders of these three.
        supernet_inputs, architecture_inputs, final_inputs: The inputs of these three.
    """

    first: Recipe
    loop: LoopConfig
    last: Recipe
    supernet: Path
    architecture: Path
    out: Path
    supernet_inputs: Inputs
    architecture_inputs: Inputs
    final_inputs: Inputs


def search(recipe: Recipe, out: Path, *, device: str = "auto", quiet: bool = False) -> SearchResult:
    """Searches the architecture that a recipe's [search] asks for, and trains it; an interrupted search goes on.

    Args:
        recipe: The recipe with data, model (or checkpoint), training and search.
        out: The folder.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
        quiet: Show no progress.

    Raises:
        MpqError: Bad data or options; a folder that holds something else; a loss that is not finite (with the batch).
    """
    out, where = Path(out), choose_device(device)
    start = search_start(recipe, where)
    if len(start.model.heads) == 1:  # nothing else has a loss
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"ctc_weight": 1.0})})
    data = _read_data(recipe, start)
    plan = _plan(recipe, start, data, out)
    _check_folders(plan)
    with processes(where) as workers:
        job = Job(
            model=start.model,
            data=data.train,
            options=plan.first.train,
            augment=recipe.augment,
            channel=recipe.data.channel,
            seed=recipe.seed,
            out=plan.supernet,
            inputs=plan.supernet_inputs,
            workers=workers,
            quiet=quiet,
        )
        phases = Phases(recipe, start, job, quiet or workers.rank > 0)
        supernet_training = phases.train_supernet(plan.first, data.dev)
        architecture = phases.choose(plan.architecture, plan.architecture_inputs, data.held_out, plan.loop)
        done = phases.train_found(out, plan.final_inputs, plan.last, data.dev, architecture)
        result = SearchResult(
            checkpoint=start.checkpoint,
            space=recipe.search.space,
            method=recipe.search.method,
            eta=recipe.search.eta,
            target_millions=recipe.search.target_millions,
            supernet=str(plan.supernet),
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


def _read_data(recipe: Recipe, start: Start) -> _Data:
    """Returns the data of all phases; a search that imitates needs no transcripts."""
    data = recipe.data
    texts: Literal["ignored", "needed"] = "ignored" if start.is_imitating else "needed"
    train = read_set(data.train, data, start.model, max(recipe.augment.speed), is_training=True, texts=texts)
    dev = read_set([data.dev], data, start.model, 1.0, is_training=False, texts=texts) if data.dev else None
    held_out = recipe.search.held_out or data.dev
    assert held_out is not None, "the recipe was checked"
    return _Data(train, dev, read_set([held_out], data, start.model, 1.0, is_training=False, texts=texts))


def _plan(recipe: Recipe, start: Start, data: _Data, out: Path) -> _Plan:
    """Returns the plan of the three phases."""
    train, options = recipe.train, recipe.search
    epochs = options.supernet_epochs or (train.epochs if start.checkpoint is None else max(1, train.epochs // 3))
    first = recipe.model_copy(update={"train": train.model_copy(update={"epochs": epochs})})
    final = train.model_copy(
        update={
            "epochs": max(1, train.epochs // 2) if options.final_epochs is None else options.final_epochs,
            "learning_rate": options.final_learning_rate or train.learning_rate / 2,
        }
    )
    last = recipe.model_copy(update={"train": final})
    loop = loop_options(options, train)
    supernet = Inputs.of(
        format=[TRAINING_FORMAT, SEARCH_FORMAT],
        seed=recipe.seed,
        checkpoint=start.checkpoint and start.checkpoint["sha256"],
        imitates=start.is_imitating,
        space=[[(module.widths, module.ranks) for module in block] for block in start.space],
        data=used_data(recipe, data.train, data.dev) | {"statistics": _statistics_identity(recipe)},
        finetune=options_of(recipe.finetune, only=IMITATION_OPTIONS) if start.is_imitating else {},
        **weight_options(first),
    )
    architecture = Inputs.of(
        supernet=supernet.values,
        data={"held_out": data_identity(data.held_out.utterances)},
        search=options_of(options, only=CHOICE_OPTIONS),
        train=options_of(train, only=("batch_frames", "precision")),
    )
    return _Plan(
        first=first,
        loop=loop,
        last=last,
        supernet=Path(options.supernet) if options.supernet else out / "supernet",
        architecture=out / "architecture",
        out=out,
        supernet_inputs=supernet,
        architecture_inputs=architecture,
        final_inputs=Inputs.of(architecture=architecture.values, **weight_options(last)),
    )


def _statistics_identity(recipe: Recipe) -> str | None:
    """Returns the identity of the audio for a trained model's statistics; None for a search from scratch."""
    if recipe.checkpoint is None:
        return None
    return data_identity(read_data(recipe.path(recipe.calibration()), recipe.data.skip_bad))


def _check_folders(plan: _Plan) -> None:
    """Makes the folders of the phases; before that, raises MpqError if one of them holds something else."""
    shared = f"choose another --out, and --supernet {plan.supernet} to share the supernet; or delete the folder"
    alone = "choose another --supernet (or --out), or delete the folder"
    check_folder(plan.supernet, plan.supernet_inputs, remedy=alone)
    check_folder(plan.architecture, plan.architecture_inputs, ARCHITECTURE_FILE, ARCHITECTURE_FORMAT, (), remedy=shared)
    check_folder(plan.out, plan.final_inputs, models=(MODEL_FILE, RECIPE_FILE), remedy=shared)
    for folder in (plan.out, plan.supernet, plan.architecture):
        make_folder(folder)


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
