"""What a training says of itself: its epochs, its result, and the weights that come out of several epochs."""

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
    """One epoch.

    Attributes:
        epoch: From 1; in a fine-tuning 0 is the start.
        step: Updates so far.
        train_loss: Mean of the losses of its updates, nats a token (of a fine-tuning a mixture); None for epoch 0.
        dev_loss: Nats a token (of a fine-tuning: divergence); None without held-out data, as the next one.
        dev_wer: Greedy CTC, a fraction.
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
    """`mpq.training/1`: what a finished training says of itself.

    Attributes:
        fingerprint: The digest of recipe and data.
        epochs: All that were trained.
        averaged: The epochs whose weights the model has.
        dev_loss, dev_wer: Of the model; None without held-out data.
        parameters: As `AsrModel.parameter_counts`.
        utterances, hours, skipped, too_long: Of the training data; the last two are counts of what was left out.
        seconds: Wall-clock time of all epochs.
        device, processes: Where.
        inputs: All that it depends on, as `mpq.identity.Inputs` has it; the fingerprint is their digest.
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
        epochs: All so far.
        select: "wer" or "loss" of the held-out data, or "last": the latest is the best.
    """
    if select == "last":
        return sorted(epochs, key=lambda one: -one.epoch)
    if select == "loss":
        return sorted(epochs, key=lambda one: (one.dev_loss, one.epoch))
    return sorted(epochs, key=lambda one: (one.dev_wer, one.dev_loss, one.epoch))


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Returns the mean of the weights of checkpoints, BatchNorm's running statistics included."""
    sums: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_checkpoint(path).state_dict().items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0) + tensor.double()
    return {name: (total / len(paths)).float() for name, total in sums.items()}
