"""What a fine-tuning says of itself when it is finished."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq.files import read_json
from mpq.training.record import EpochResult

FINETUNE_FORMAT = "mpq.finetune/1"


@dataclass(frozen=True)
class FinetunedSize:
    """What became of one allocation.

    Attributes:
        name: The name of the allocation's file.
        path: The packed artifact.
        size_bytes, average_bits: The artifact's size, and its code bits a weight.
        ratio: How many times smaller than the float32 parameters the artifact is.
        start_divergence, start_wer: On the held-out data before the training: bounded divergence from the float model,
            nats per frame (or token of an attention decoder), and WER of greedy CTC, a fraction (None: no transcripts).
        divergence, wer: The same of the artifact.
        dev: ((divergence, wer), ...) after each epoch, the starting weights first.
    """

    name: str
    path: str
    size_bytes: int
    average_bits: float
    ratio: float
    start_divergence: float
    start_wer: float | None
    divergence: float
    wer: float | None
    dev: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class FinetuneResult:
    """`mpq.finetune/1`: what a finished fine-tuning says of itself.

    Attributes:
        fingerprint: A digest of all that the weights depend on: model, allocations, options and data.
        checkpoint: {"path", "sha256"} of the float model.
        sizes: One for each allocation, the largest first.
        epochs: The epochs trained, after the starting weights as epoch 0; dev figures are means over the allocations.
        averaged: The epochs whose weights the artifacts have.
        utterances, hours, transcribed, skipped, too_long: The size of the training data, how many utterances have a
            text, and how many were left out as faulty or too long.
        seed: What all random choices were keyed by.
        seconds: Wall-clock time of all epochs.
        device, processes: Where the work ran, and how many processes shared it.
        inputs: All that the result depends on, as `mpq.identity.Inputs` has it; the fingerprint is their digest.
    """

    fingerprint: str
    checkpoint: dict[str, str]
    sizes: tuple[FinetunedSize, ...]
    epochs: tuple[EpochResult, ...]
    averaged: tuple[int, ...]
    utterances: int
    hours: float
    transcribed: int
    skipped: int
    too_long: int
    seed: int
    seconds: float
    device: str
    processes: int
    inputs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FINETUNE_FORMAT} | asdict(self)

    @classmethod
    def load(cls, path: Path) -> "FinetuneResult":
        """Reads a `finetune.json`."""
        raw = read_json(path, FINETUNE_FORMAT)
        del raw["format"]
        raw["sizes"] = tuple(FinetunedSize(**(size | {"dev": tuple(map(tuple, size["dev"]))})) for size in raw["sizes"])
        raw["epochs"] = tuple(EpochResult(**epoch) for epoch in raw["epochs"])
        raw["averaged"] = tuple(raw["averaged"])
        return cls(**raw)
