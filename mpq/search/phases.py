"""The three phases of an architecture search, each in its folder: the supernet, the architecture, the model found."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from mpq.config import AugmentConfig, LoopConfig, Recipe, TrainConfig
from mpq.identity import Inputs
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, read_checkpoint
from mpq.models.reshaping import sliced
from mpq.search.loop import ARCHITECTURE_FILE, ArchitectureSearch
from mpq.search.record import Architecture
from mpq.search.start import Start, largest_model
from mpq.search.supernet import Supernet
from mpq.training.data import TrainingSet
from mpq.training.folder import finished_training, is_finished
from mpq.training.loop import Job
from mpq.training.objectives import Imitation, Objective, Transcripts
from mpq.training.record import TrainingResult
from mpq.training.weights import WeightTrainer

_log = logging.getLogger(__name__)


class Phases:
    """The three phases.

    Args:
        recipe: The user's recipe.
        start: The model and the candidates at the start.
        job: The job of the first phase.
        quiet: Log no messages.
    """

    def __init__(self, recipe: Recipe, start: Start, job: Job, quiet: bool) -> None:
        self.recipe, self.start, self.job, self.quiet = recipe, start, job, quiet
        self.supernet_file = job.out / MODEL_FILE

    def train_supernet(self, recipe: Recipe, dev: TrainingSet | None) -> TrainingResult:
        """Returns the result of the first phase."""
        job = self.job
        if done := finished_training(job.out, job.workers.rank):
            self._say("1 of 3, the supernet: done")
            return done
        self._say("1 of 3, the supernet")
        model = largest_model(self.recipe, self.start)
        supernet = Supernet(model, self.start.space)

        def sample(step: int | None) -> None:
            if step is None:
                supernet.be_whole()
            else:
                supernet.be_sampled(job.seed, step)

        trainer = WeightTrainer(replace(job, model=model), recipe, self._objective(model, recipe.train), dev, sample)
        return trainer.train()

    def choose(self, out: Path, inputs: Inputs, held_out: TrainingSet, options: LoopConfig) -> Architecture:
        """Returns the result of the second phase."""
        if is_finished(out, [ARCHITECTURE_FILE], self.job.workers.rank):
            self._say("2 of 3, the architecture: done")
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
            inputs=inputs,
        )
        objective = self._objective(model, self.recipe.train)
        return ArchitectureSearch(job, self.recipe.search, objective, supernet, self.start.most_parameters).choose()

    def train_found(
        self, out: Path, inputs: Inputs, recipe: Recipe, dev: TrainingSet | None, found: Architecture
    ) -> TrainingResult:
        """Returns the result of the third phase."""
        job = replace(self.job, options=recipe.train, out=out, inputs=inputs)
        if done := finished_training(out, job.workers.rank):
            self._say("3 of 3, the model found: done")
            return done
        self._say(f"3 of 3, the model found: {found.millions:.3f} of {found.largest_millions:.3f} M parameters")
        model = sliced(read_checkpoint(self.supernet_file).to(self._device()), found.shapes())
        return WeightTrainer(replace(job, model=model), recipe, self._objective(model, recipe.train), dev).train()

    def _objective(self, model: AsrModel, options: TrainConfig) -> Objective:
        channel, workers = self.recipe.data.channel, self.job.workers
        if not self.start.is_imitating:
            return Transcripts(model, options, channel, workers)
        return Imitation(model, self.start.model, self.recipe.finetune, channel, workers)

    def _device(self) -> torch.device:
        return next(self.start.model.parameters()).device

    def _say(self, text: str) -> None:
        if not self.quiet:
            _log.info("phase %s", text)
