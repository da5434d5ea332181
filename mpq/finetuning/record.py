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
        name: Of the allocation's file.
        path: The packed artifact.
        size_bytes, average_bits: Its size, and code bits a weight.
        ratio: How many times smaller than the float32 parameters it is.
        start_divergence, start_wer: On the held-out data before the training: bounded divergence from the float model,
            nats per frame (or token of an attention decoder), and WER of greedy CTC, a fraction (None: no transcripts).
        divergence, wer: The same of the artifact.
        dev: ((divergence, wer), ...) after each epoch, the start first.
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
        fingerprint: Of model, allocations, options and data.
        checkpoint: {"path", "sha256"} of the float model.
        sizes: One for each allocation, the largest first.
        epochs: All that were trained, and the start as epoch 0; dev figures are means over the allocations.
        averaged: The epochs whose weights the artifacts have.
        utterances, hours, transcribed, skipped, too_long: Of the training data; `transcribed` of them have a text.
        seed: Of all random choices.
        seconds: Wall-clock time of all epochs.
        device, processes: Where.
        inputs: All that it depends on, as `mpq.identity.Inputs` has it; the fingerprint is their digest.
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
