"""The commands that follow a recipe, or make one up from their options: train, search, run, finetune."""

import copy
from pathlib import Path
from typing import Any

import click

from mpq.cli.options import (
    PATH,
    channel_options,
    common_options,
    print_once,
    print_result,
    recipe_options,
    section_options,
    set_option,
    with_seed,
)
from mpq.config import FinetuneConfig, SearchConfig
from mpq.errors import MpqError


@click.command()
@recipe_options
@common_options
def train(
    recipe: Path, overrides: tuple[str, ...], out: Path, device: str, quiet: bool, as_json: bool, **_: Any
) -> None:
    """Train the hybrid CTC/attention Conformer of a recipe.

    A training that was cut off goes on where it stopped, with the same losses. Under torchrun, the processes share
    every batch.

    \b
    Examples:
      mpq train recipes/digits/digits.toml --out runs/digits/train
      torchrun --nproc-per-node 4 -m mpq train recipes/librispeech/librispeech.toml --out runs/ls/train
    """
    from mpq.cli.tables import training_view
    from mpq.pipeline.read import load_recipe
    from mpq.training.run import train as step

    result = step(load_recipe(recipe, with_seed(overrides), stages=["train"]), out, device=device, quiet=quiet)
    print_once(result, as_json, training_view(result))


SEARCH_FROM_CHECKPOINT = {
    "train": {
        "epochs": 6,
        "batch_frames": 4800,
        "learning_rate": 3e-4,
        "warmup_steps": 50,
        "schedule": "cosine",
        "average": 1,
        "select": "loss",
    },
    "augment": {"frequency_masks": 0, "time_masks": 0},
}
"""The options of `mpq search CHECKPOINT`, unless --set says otherwise: the model is trained already."""


@click.command()
@click.argument("source", type=PATH, metavar="RECIPE|CHECKPOINT")
@click.option("--train", "train_data", multiple=True, type=PATH, help="Data to train a checkpoint on; may be repeated.")
@click.option("--dev", type=PATH, help="Held-out data of a checkpoint, on which the architecture is chosen.")
@click.option("--out", required=True, type=PATH, help="The folder to write.")
@section_options(SearchConfig, without=("trained",))
@channel_options
@set_option
@common_options
def search(
    source: Path,
    train_data: tuple[Path, ...],
    dev: Path | None,
    out: Path,
    channel: str,
    skip_bad: bool,
    overrides: tuple[str, ...],
    seed: int,
    device: str,
    quiet: bool,
    as_json: bool,
    **options: str | None,
) -> None:
    """Find a smaller architecture: the widths, and ranks, of the encoder's feed-forward modules (Gumbel-softmax DARTS).

    The search begins with a recipe, or with a trained checkpoint, --train and --dev. It has three phases: the supernet
    of all candidates is trained; the architecture is chosen on held-out data, by their loss and by a penalty on
    parameters (--eta) or a size (--target-millions); the architecture is cut out and trained on. The folder is a
    checkpoint folder with a recipe.toml for what follows. A checkpoint's supernet is trained for 2 epochs, and what is
    found for 3, at a low rate and without SpecAugment (--set train.KEY=VALUE for another training). A search that was
    cut off goes on where it stopped; searches of other penalties may share one --supernet, once it is trained.

    \b
    Examples:
      mpq search recipes/digits/search.toml --eta 0.1 --out runs/search
      mpq search recipes/digits/search.toml --target-millions 1.2 --supernet runs/search/supernet --out runs/search2
      mpq search model.nemo --train train.jsonl --dev dev.jsonl --target-millions 10 --out runs/narrow
    """
    from mpq.cli.tables import search_view
    from mpq.pipeline.read import load_recipe, make_recipe
    from mpq.search.run import search as step

    for key in ("supernet", "held_out"):  # paths of a command line start at the working directory
        if (path := options[key]) is not None:
            options[key] = str(Path(path).absolute())
    given = [f"search.{key}={value}" for key, value in options.items() if value is not None]
    if source.suffix == ".toml":
        if train_data or dev or channel != "error" or skip_bad:
            raise MpqError(
                f"--train, --dev, --channel, --skip-bad: {source} is a recipe, whose [data] say that; leave them out"
            )
        recipe = load_recipe(source, with_seed([*given, *overrides]), stages=["search"])
    else:
        if not train_data or not dev:
            raise MpqError(f"--train, --dev: expected both for a checkpoint ({source}), or a recipe (.toml) instead")
        data = _paths(train_data, dev) | {"channel": channel, "skip_bad": skip_bad}
        table = {"seed": seed, "checkpoint": str(source.absolute()), "data": data}
        table |= copy.deepcopy(SEARCH_FROM_CHECKPOINT)
        known = ("data", "train", "augment", "search", "finetune")
        recipe = make_recipe(table, [*given, *overrides], "mpq search", known, stages=["search"])
    result = step(recipe, out, device=device, quiet=quiet)
    print_once(result, as_json, search_view(result))


@click.command()
@recipe_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@common_options
def run(
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path,
    dry_run: bool,
    device: str,
    quiet: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Do all stages of a recipe, in one run folder.

    The stages are train, search, evaluate, sensitivity, allocate, pack, finetune and compare.

    A stage whose inputs are unchanged is skipped, and one that was cut off goes on; a line says so for each. All faults
    of a recipe are told at once, before anything starts.

    \b
    Examples:
      mpq run recipes/digits/digits.toml --out runs/digits
      mpq run recipes/digits/digits.toml --out runs/digits --set allocate.target_ratio=10 --dry-run
    """
    from mpq.cli.tables import run_view
    from mpq.pipeline.read import load_recipe
    from mpq.pipeline.run import run as step

    result = step(load_recipe(recipe, with_seed(overrides)), out, dry_run=dry_run, device=device, quiet=quiet)
    print_result(result, as_json, run_view(result))


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--allocation",
    "allocations",
    required=True,
    multiple=True,
    type=PATH,
    help="mpq.allocation/1 file, once for each size.",
)
@click.option(
    "--train", "train_data", required=True, multiple=True, type=PATH, help="Data to train on; may be repeated."
)
@click.option("--dev", required=True, type=PATH, help="Held-out data, on which the epoch that is kept is chosen.")
@click.option("--out", required=True, type=PATH, help="The folder to write.")
@click.option("--data", type=PATH, help="The allocation's calibration audio, if it was moved since.")
@section_options(FinetuneConfig)
@channel_options
@set_option
@common_options
def finetune(
    checkpoint: Path,
    allocations: tuple[Path, ...],
    train_data: tuple[Path, ...],
    dev: Path,
    out: Path,
    data: Path | None,
    channel: str,
    skip_bad: bool,
    overrides: tuple[str, ...],
    seed: int,
    device: str,
    quiet: bool,
    as_json: bool,
    **tuning: str | None,
) -> None:
    """Train the quantized weights, so that the model makes up for its rounding (quantization-aware training).

    The trained model is the teacher, so the audio needs no transcripts. The folder gets the packed artifact, whose
    weights are those that were trained, bit for bit. With several allocations, one training serves all sizes.
    Augmentation is off unless asked for: --set 'finetune_augment.speed=[0.9,1.0,1.1]'. A run that was cut off goes on
    where it stopped. Under torchrun, the processes share every batch.

    \b
    Examples:
      mpq finetune model.nemo --allocation alloc.json --train train.jsonl --dev dev.jsonl --out runs/qat
      mpq finetune model.nemo --allocation large.json --allocation small.json --train train.jsonl --dev dev.jsonl \\
        --out runs/two_sizes --epochs 8
    """
    from mpq.cli.tables import finetune_view
    from mpq.finetuning.run import finetune as step
    from mpq.pipeline.read import make_recipe

    table = {"seed": seed, "data": _paths(train_data, dev) | {"channel": channel, "skip_bad": skip_bad}}
    given = [f"finetune.{key}={value}" for key, value in tuning.items() if value is not None]
    known = ("data", "finetune", "finetune_augment")
    recipe = make_recipe(table, [*given, *overrides], "mpq finetune", known)
    result = step(checkpoint, allocations, recipe, out, calibration=data, device=device, quiet=quiet)
    print_once(result, as_json, finetune_view(result))


def _paths(train_data: tuple[Path, ...], dev: Path) -> dict[str, Any]:
    """Returns the paths of a recipe's [data], which do not depend on where the recipe is."""
    return {"train": [str(path.absolute()) for path in train_data], "dev": str(dev.absolute())}
