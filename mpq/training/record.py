"""The record of a training: its epochs and its result; and the average of the weights of several epochs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mpq.files import read_json
from mpq.models.checkpoint import read_checkpoint

TRAINING_FORMAT = "mpq.training/1"


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch.

    Attributes:
        epoch: The number of the epoch, from 1; epoch 0 of a fine-tuning is the starting weights.
        step: The number of updates so far.
        train_loss: Mean of the losses of its updates, nats a token (in a fine-tuning a mixture); None for epoch 0.
        dev_loss: Loss on the held-out data, nats a token (in a fine-tuning, the divergence); None without such data,
            and where it is not finite.
        dev_wer: WER of greedy search on the held-out data, a fraction; None without such data or their transcripts.
        seconds: Wall-clock time, evaluation included.
    """

    epoch: int
    step: int
    train_loss: float | None
    dev_loss: float | None
    dev_wer: float | None
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """`mpq.training/1`: the result of a finished training.

    Attributes:
        fingerprint: The digest of the inputs.
        epochs: All epochs that were trained.
        averaged: The epochs whose weights were averaged to make the model.
        dev_loss, dev_wer: The model's loss and WER on the held-out data; None without such data.
        parameters: The numbers of parameters that `AsrModel.parameter_counts` returns.
        utterances, hours: The size of the training data.
        skipped, too_long: The numbers of utterances that were left out as faulty, and as longer than `max_seconds`.
        seconds: Wall-clock time of all epochs.
        device, processes: The device that was used, and the number of processes.
        inputs: All that the weights depend on, as in `mpq.identity.Inputs`.
    """

    fingerprint: str
    epochs: tuple[EpochResult, ...]
    averaged: tuple[int, ...]
    dev_loss: float | None
    dev_wer: float | None
    parameters: dict[str, int]
    utterances: int
    hours: float
    skipped: int
    too_long: int
    seconds: float
    device: str
    processes: int
    inputs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": TRAINING_FORMAT} | asdict(self)

    @classmethod
    def load(cls, path: Path) -> "TrainingResult":
        """Reads a `training.json`."""
        raw = read_json(path, TRAINING_FORMAT)
        del raw["format"]
        raw["epochs"] = tuple(EpochResult(**epoch) for epoch in raw["epochs"])
        raw["averaged"] = tuple(raw["averaged"])
        return cls(**raw)


def rank_epochs(epochs: Sequence[EpochResult], select: str) -> list[EpochResult]:
    """Returns the epochs, the best first.

    Args:
        epochs: All epochs so far.
        select: The measure of the best: "wer" or "loss" on the held-out data, or "last", by which it is the latest.
    """
    if select == "last":
        return sorted(epochs, key=lambda one: -one.epoch)
    losses = {one.epoch: math.inf if one.dev_loss is None else one.dev_loss for one in epochs}
    if select == "loss":
        return sorted(epochs, key=lambda one: (losses[one.epoch], one.epoch))
    return sorted(epochs, key=lambda one: (one.dev_wer, losses[one.epoch], one.epoch))


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Returns the mean of the weights of checkpoints, BatchNorm's running statistics included."""
    sums: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_checkpoint(path).state_dict().items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0) + tensor.double()
    return {name: (total / len(paths)).float() for name, total in sums.items()}
