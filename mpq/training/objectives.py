"""What the weights of a model, or its architecture, are judged by: transcripts, or a trained model as teacher.

Legend: N utterances.
"""

from abc import ABC, abstractmethod
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
from mpq.training.losses import JointLoss

IMITATION_OPTIONS = {"bound", "hidden_weight", "ctc_weight", "teacher_hears", "dropout", "batch_norm"}
"""The options of [finetune] that an `Imitation` reads."""


class Objective(ABC):
    """A loss of batches, and figures on held-out data.

    Attributes:
        module: Whose forward pass gives the losses; its parameters may be trained.
        logged: Names of the parts of the loss.
    """

    module: nn.Module
    logged: tuple[str, ...]

    @abstractmethod
    def prepare(self) -> None:
        """Puts the model into the mode in which its weights are trained."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch, data: TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what `TrainingLoop.losses` does.

        Args:
            module: `self.module`, or what wraps it.
            batch: This process's share.
            data: What the batch's indices count in.
        """

    @abstractmethod
    def total(self, values: dict[str, float]) -> float:
        """Returns the loss that its parts make up."""

    @abstractmethod
    def held_out(self, data: TrainingSet) -> tuple[float, float | None]:
        """Returns loss and WER (a fraction; None: no transcripts) on held-out data; leaves the model in eval mode."""


class Transcripts(Objective):
    """The joint CTC/attention loss (Li et al. 2023, Eq. 1)."""

    def __init__(self, model: AsrModel, options: TrainConfig, channel: str, workers: Processes) -> None:
        self.options, self.channel, self.workers = options, channel, workers
        self.module = JointLoss(model, options.label_smoothing)
        self.logged = ("ctc", "attention") if model.decoder_segments else ("ctc",)

    def prepare(self) -> None:
        self.module.model.train()

    def losses(self, module: nn.Module, batch: Batch, data: TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
        ctc, attention = module(batch.features, batch.frames, batch.targets)
        counts = [len(data.tokens[index]) for index in batch.update_indices]
        sums = torch.stack([ctc.sum() / max(1, sum(counts)), attention.sum() / (sum(counts) + len(counts))])
        weight = self.options.ctc_weight
        return weight * sums[0] + (1 - weight) * sums[1], sums[: len(self.logged)], ctc + attention

    def total(self, values: dict[str, float]) -> float:
        weight = self.options.ctc_weight
        return weight * values["ctc"] + (1 - weight) * values.get("attention", 0.0)

    def held_out(self, data: TrainingSet) -> tuple[float, float]:
        return held_out_errors(self.module, data, self.options.ctc_weight, self.channel, self.workers)


class Imitation(Objective):
    """The outputs and hidden states of a trained model (`mpq.training.distillation`); needs no transcripts."""

    def __init__(
        self, model: AsrModel, teacher: AsrModel, options: FinetuneConfig, channel: str, workers: Processes
    ) -> None:
        self.model, self.teacher, self.options = model, teacher, options
        self.channel, self.workers = channel, workers
        has_hidden = options.hidden_weight > 0
        self.ctc_weight = options.ctc_weight if teacher.decoder_segments else 1.0
        self.module = Distillation(model, None, teacher, options.bound, 0.0, has_hidden, has_transcripts=False)
        self.logged = ("ctc_kl",)
        self.logged += ("attention_kl",) if teacher.decoder_segments else ()
        self.logged += ("hidden",) if has_hidden else ()

    def prepare(self) -> None:
        training_mode(self.model, self.options)

    def losses(self, module: nn.Module, batch: Batch, data: TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
        heard = batch.clean if self.options.teacher_hears == "clean" else batch.features
        untold = torch.zeros(len(batch.items), dtype=torch.bool, device=batch.frames.device)
        found = DistillationLosses(*module(batch.features, heard, batch.frames, batch.targets, untold))
        values = distilled(found, self.workers, batch.of)
        parts = torch.stack([values[name] for name in self.logged])
        return self._mixed(values), parts, found.ctc_kl + found.attention_kl + found.hidden

    def _mixed(self, values: dict[str, Any]) -> Any:
        return mixed_distillation(values, self.ctc_weight, self.options.hidden_weight)

    def total(self, values: dict[str, float]) -> float:
        return self._mixed(values)

    def held_out(self, data: TrainingSet) -> tuple[float, float | None]:
        self.model.eval()
        return changed_errors(self.teacher, self.model, data, self.channel, self.workers)


def training_mode(model: AsrModel, options: FinetuneConfig) -> None:
    """Puts a model that imitates a trained one into training mode: dropout and batch statistics as `options` say."""
    model.train(options.dropout)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(options.batch_norm == "updated")


def mixed_distillation(values: dict[str, Any], ctc_weight: float, hidden_weight: float) -> Any:
    """Returns the loss that the parts of a distillation make up, those that there are."""
    outputs = ctc_weight * values["ctc_kl"] + (1 - ctc_weight) * values.get("attention_kl", 0.0)
    return outputs + hidden_weight * values.get("hidden", 0.0)


def distilled(found: DistillationLosses, workers: Processes, parts: int) -> dict[str, Tensor]:
    """Returns this process's share of the distillation's means over the rows of a batch.

    Args:
        found: Of this process's utterances.
        workers: The processes that share the batch.
        parts: Over how many batches and passes the shares add up.
    """
    counts = torch.stack([found.frames.sum(), found.tokens.sum()]).detach().double().cpu()
    workers.add_up(counts)
    rows, tokens = counts.clamp(min=1).tolist()
    return {
        "ctc_kl": found.ctc_kl.sum() / rows / parts,
        "attention_kl": found.attention_kl.sum() / tokens / parts,
        "hidden": found.hidden.sum() / rows / parts,
    }
