"""Training a hybrid CTC/attention Conformer from a recipe (`mpq train`).

A checkpoint folder holds `model.safetensors` (there when the training is complete), `recipe.json` (what was trained,
all defaults written out), `log.jsonl` (a line for each update and each epoch) and `training.json` (the result). While
the training runs, `state.pt` is where it goes on after an interruption, and `epochs/` has what may be averaged.

Interrupt it anywhere (`mpq.training.loop`): the losses are the same. They are sums over the whole batch divided by its
tokens, and batch normalisation sees the whole batch, so they do not depend on the number of processes either (but for
dropout, which each process draws for itself).
"""

from pathlib import Path

import torch

from mpq.config import Recipe
from mpq.files import make_folder
from mpq.runtime import choose_device, processes
from mpq.speech.text import train_tokenizer
from mpq.training.building import build_model
from mpq.training.data import read_set, read_transcripts
from mpq.training.folder import check_folder, finished_training, training_inputs
from mpq.training.loop import Job
from mpq.training.objectives import Transcripts
from mpq.training.record import TrainingResult
from mpq.training.weights import WeightTrainer


def train(recipe: Recipe, out: Path, *, device: str = "auto", quiet: bool = False) -> TrainingResult:
    """Trains the model of a recipe and writes the checkpoint folder `out`; an interrupted training goes on.

    Args:
        recipe: The recipe, as `load_recipe` returns it.
        out: The folder.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
        quiet: Show no progress.

    Raises:
        MpqError: Bad data; a folder that holds another training; a loss that is not finite, with the batch.
    """
    where = choose_device(device)
    make_folder(out)
    tokenizer = train_tokenizer(recipe.tokens.type, read_transcripts(recipe.data), recipe.tokens.vocabulary_size)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer).to(where)
    fastest = max(recipe.augment.speed)
    data = read_set(recipe.data.train, recipe.data, model, fastest, is_training=True)
    dev = read_set([recipe.data.dev], recipe.data, model, 1.0, is_training=False) if recipe.data.dev else None
    inputs = training_inputs(recipe, data, dev)
    check_folder(Path(out), inputs)
    with processes(where) as workers:
        if done := finished_training(Path(out), workers.rank):
            return done
        job = Job(
            model=model,
            data=data,
            options=recipe.train,
            augment=recipe.augment,
            channel=recipe.data.channel,
            seed=recipe.seed,
            out=Path(out),
            inputs=inputs,
            workers=workers,
            quiet=quiet,
        )
        objective = Transcripts(model, recipe.train, recipe.data.channel, workers)
        return WeightTrainer(job, recipe, objective, dev).train()
