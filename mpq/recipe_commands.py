"""The commands that follow a recipe: train, run."""

from pathlib import Path
from typing import Any

import click

from mpq.options import common_options, print_once, print_result, recipe_options, with_seed


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
    from mpq.recipes import load_recipe
    from mpq.report import training_view
    from mpq.training import train as step

    result = step(load_recipe(recipe, with_seed(overrides), stages=["train"]), out, device=device, quiet=quiet)
    print_once(result, as_json, training_view(result))


@click.command()
@recipe_options
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
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
    """Do all stages of a recipe, in one run folder: train, evaluate, sensitivity, allocate, pack, compare.

    A stage whose inputs are unchanged is skipped, one that was cut off goes on; each says so. All faults of a recipe
    are told at once, before anything starts.

    \b
    Examples:
      mpq run recipes/digits/digits.toml --out runs/digits
      mpq run recipes/digits/digits.toml --out runs/digits --set allocate.target_ratio=10 --dry-run
    """
    from mpq.pipeline import run as step
    from mpq.recipes import load_recipe
    from mpq.report import run_view

    result = step(load_recipe(recipe, with_seed(overrides)), out, dry_run=dry_run, device=device, quiet=quiet)
    print_result(result, as_json, run_view(result))
