"""The objectives of a training: the loss on transcripts, or the distance from a trained model.

Legend: N utterances.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq.config import FinetuneConfig, TrainConfig
from mpq.models.base import AsrModel
from mpq.runtime import Processes
from mpq.training.batch import Batch
from mpq.training.data import TrainingSet
from mpq.training.distillation import Distillation, DistillationLosses
from mpq.training.held_out import changed_errors, held_out_errors
from mpq.training.losses import JointLoss, joint

IMITATION_OPTIONS = {"bound", "hidden_weight", "ctc_weight", "teacher_hears", "dropout", "batch_norm"}
"""The options of [finetune] that an `Imitation` reads."""


class Objective(ABC):
    """A loss of batches, and figures on held-out data.

    Attributes:
        module: The module whose forward pass gives the losses; its parameters may be trained.
        logged: Names of the parts of the loss.
    """

    module: nn.Module
    logged: tuple[str, ...]

    @abstractmethod
    def prepare(self) -> None:
        """Puts the model into the mode in which its weights are trained."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch, data: TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss of a batch, its parts and the losses of its utterances, as `TrainingLoop.losses` describes.

        Args:
            module: `self.module`, or the module that wraps it.
            batch: This process's share of the batch.
            data: The utterances that the batch's indices refer to.
        """

    @abstractmethod
    def total(self, values: dict[str, float]) -> float:
        """Returns the loss that its parts make up."""

    @abstractmethod
    def held_out(self, data: TrainingSet) -> tuple[float, float | None]:
        """Returns loss and WER (a fraction; None: no transcripts) on held-out data; leaves the model in eval mode."""


class Transcripts(Objective):
    """The transcripts' joint loss (Li et al. 2023, Eq. 1)."""

    def __init__(self, model: AsrModel, options: TrainConfig, channel: str, workers: Processes) -> None:
        self.options, self.channel, self.workers = options, channel, workers
        self.loss = JointLoss(model, options.label_smoothing)
        self.module, self.logged = self.loss, model.heads

    def prepare(self) -> None:
        self.loss.model.train()

    def losses(self, module: nn.Module, batch: Batch, data: TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
        losses = module(batch.features, batch.frames, batch.targets)
        tokens = sum(len(data.tokens[index]) for index in batch.update_indices)
        means = {
            head.name: losses[head.name].sum() / head.loss_tokens(tokens, len(batch.update_indices))
            for head in self.loss.model.output_heads
        }
        parts = torch.stack([means[name] for name in self.logged])
        return self._joint(means), parts, torch.stack([*losses.values()]).sum(dim=0)

    def _joint(self, values: Mapping[str, Any]) -> Any:
        return joint(values, self.logged, self.options.ctc_weight)

    def total(self, values: dict[str, float]) -> float:
        return float(self._joint(values))

    def held_out(self, data: TrainingSet) -> tuple[float, float]:
        return held_out_errors(self.loss, data, self.options.ctc_weight, self.channel, self.workers)


class Imitation(Objective):
    """The outputs and hidden states of a trained model (`mpq.training.distillation`); needs no transcripts."""

    def __init__(
        self, model: AsrModel, teacher: AsrModel, options: FinetuneConfig, channel: str, workers: Processes
    ) -> None:
        self.model, self.teacher, self.options = model, teacher, options
        self.channel, self.workers = channel, workers
        has_hidden = options.hidden_weight > 0
        self.module = Distillation(model, None, teacher, options.bound, 0.0, has_hidden, has_transcripts=False)
        self.logged = (*(f"{head}_kl" for head in teacher.heads), *(("hidden",) if has_hidden else ()))

    def prepare(self) -> None:
        training_mode(self.model, self.options)

    def losses(self, module: nn.Module, batch: Batch, data: TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
        heard = batch.clean if self.options.teacher_hears == "clean" else batch.features
        untold = torch.zeros(len(batch.items), dtype=torch.bool, device=batch.frames.device)
        found = DistillationLosses(*module(batch.features, heard, batch.frames, batch.targets, untold))
        values = distilled(found, self.workers, batch.of)
        parts = torch.stack([values[name] for name in self.logged])
        return self._mixed(values), parts, found.each()

    def _mixed(self, values: dict[str, Any]) -> Any:
        options = self.options
        return mixed_distillation(values, self.teacher.heads, options.ctc_weight, options.hidden_weight)

    def total(self, values: dict[str, float]) -> float:
        return float(self._mixed(values))

    def held_out(self, data: TrainingSet) -> tuple[float, float | None]:
        self.model.eval()
        return changed_errors(self.teacher, self.model, data, self.channel, self.workers)


def training_mode(model: AsrModel, options: FinetuneConfig) -> None:
    """Puts a model that imitates a trained one into training mode: dropout and batch statistics as `options` say."""
    model.train(options.dropout)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train(options.batch_norm == "updated")


def mixed_distillation(values: Mapping[str, Any], heads: Sequence[str], ctc_weight: float, hidden_weight: float) -> Any:
    """Returns the loss that the parts of a distillation make up.

    Args:
        values: {"<head>_kl": divergence, "hidden": error of the hidden states, where it is wanted}.
        heads: The heads of the model.
        ctc_weight: The share of CTC, as in `mpq.training.losses.shares`.
        hidden_weight: The factor of the error of the hidden states.
    """
    divergences = {head: values[f"{head}_kl"] for head in heads}
    return joint(divergences, heads, ctc_weight) + hidden_weight * values.get("hidden", 0.0)


def distilled(found: DistillationLosses, workers: Processes, parts: int) -> dict[str, Tensor]:
    """Returns this process's share of the distillation's means over the rows of a batch: "<head>_kl" and "hidden".

    Args:
        found: The losses of this process's utterances.
        workers: The processes that share the batch.
        parts: Over how many batches and passes the shares add up.
    """
    counts = torch.stack([one.sum() for one in (found.frames, *found.rows.values())]).detach().double().cpu()
    workers.add_up(counts)
    frames, *rows = counts.clamp(min=1).tolist()
    means = {f"{head}_kl": kl.sum() / count / parts for (head, kl), count in zip(found.kl.items(), rows, strict=True)}
    return means | {"hidden": found.hidden.sum() / frames / parts}
