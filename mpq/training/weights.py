"""The loop that trains all weights of a model, whole or as the paths of a supernet, and writes a checkpoint folder."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mpq.config import Recipe
from mpq.files import write_json
from mpq.models.checkpoint import MODEL_FILE, write_checkpoint
from mpq.models.reshaping import conformer
from mpq.training.batch import Batch
from mpq.training.data import TrainingSet
from mpq.training.folder import claim_folder, clean_up
from mpq.training.loop import Job, TrainingLoop
from mpq.training.objectives import Objective
from mpq.training.optimization import make_optimizer
from mpq.training.orthogonal import constrained_factors, semi_orthogonal_step
from mpq.training.record import TrainingResult, average_weights

_log = logging.getLogger(__name__)


class WeightTrainer(TrainingLoop):
    """The training of a recipe's [train], semi-orthogonal factors included.

    Args:
        job: The model, its data and where the work runs.
        recipe: The recipe of the training; it is put on record.
        objective: The loss.
        dev: The held-out data, if there are any.
        sample: For a supernet, a function that chooses the path that it computes as. It is called with the number of
            each update (from 0), and with None, for the whole network, before held-out data are scored.
    """

    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        objective: Objective,
        dev: TrainingSet | None,
        sample: Callable[[int | None], None] | None = None,
    ) -> None:
        self.recipe, self.train_options, self.dev = recipe, recipe.train, dev
        self.objective, self.sample = objective, sample
        optimizer = make_optimizer(job.model, recipe.train.weight_decay, recipe.train.betas)
        super().__init__(job, objective.module, optimizer, objective.logged)
        self.factors = constrained_factors(conformer(job.model), recipe.train.semi_orthogonal)

    def train(self) -> TrainingResult:
        """Trains the epochs that are left and writes the model."""
        self.run()
        return self._finish()

    def begin(self) -> None:
        if self.is_chief:
            claim_folder(self.out, self.job.inputs)
            write_json(self.out / "recipe.json", self.recipe.model_dump())

    def prepare_update(self) -> None:
        self.objective.prepare()
        if self.sample:
            self.sample(self.step)

    def passes(self) -> int:
        return 1

    def losses(self, batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.objective.losses(self.loss, batch, self.data)

    def total(self, values: dict[str, float]) -> float:
        return self.objective.total(values)

    def finish_update(self) -> None:
        if self.factors and (self.step + 1) % self.train_options.semi_orthogonal_every == 0:
            for factor in self.factors:
                semi_orthogonal_step(factor)

    def blame(self, batch: Batch | None) -> str:
        return ""

    def evaluate(self) -> tuple[float | None, float | None]:
        """Returns loss and WER on the held-out data; None without such data, and for a loss that is not finite."""
        if self.dev is None:
            return None, None
        if self.sample:
            self.sample(None)
        loss, wer = self.objective.held_out(self.dev)
        if math.isfinite(loss):
            return loss, wer
        if self.is_chief:
            _log.warning("after update %d: the loss on the held-out data is %s; it counts as none", self.step, loss)
        return None, wer

    def write_candidate(self, path: Path) -> None:
        write_checkpoint(path, self.model)

    def state(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)

    def _load_average(self, epochs: list[int]) -> None:
        self.model.load_state_dict(average_weights([self.candidate_path(epoch) for epoch in epochs]), strict=False)

    def _finish(self) -> TrainingResult:
        """Writes the model: the average of the best epochs, or the best one if that is better on the held-out data."""
        ranked = self.candidates()
        choices = [ranked] if len(ranked) <= 1 or self.dev is None else [ranked, ranked[:1]]
        results = []
        for epochs in choices:
            if epochs:
                self._load_average(epochs)
            loss, wer = self.evaluate()
            score = loss if self.options.select == "loss" or wer is None else wer
            worst = math.inf if self.dev else 0.0
            results.append((worst if score is None else score, loss, wer, epochs))
        _, loss, wer, epochs = min(results, key=lambda one: one[0])
        if epochs is not choices[-1]:
            self._load_average(epochs)
        result = TrainingResult(
            fingerprint=self.job.inputs.fingerprint,
            epochs=tuple(self.epochs),
            averaged=tuple(sorted(epochs)),
            dev_loss=loss,
            dev_wer=wer,
            parameters=self.model.parameter_counts(),
            utterances=len(self.data.utterances),
            hours=sum(self.data.durations) / 3600,
            skipped=self.data.skipped,
            too_long=self.data.too_long,
            seconds=self.seconds,
            device=str(self.device),
            processes=self.workers.count,
            inputs=self.job.inputs.values,
        )
        if self.is_chief:
            write_checkpoint(self.out / MODEL_FILE, self.model)
            write_json(self.out / "training.json", result.to_json())
            clean_up(self.out)
        self.workers.barrier()
        return result
