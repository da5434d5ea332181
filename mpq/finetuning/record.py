"""The result of a finished fine-tuning."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq.files import read_json
from mpq.training.record import EpochResult

FINETUNE_FORMAT = "mpq.finetune/1"


@dataclass(frozen=True)
class FinetunedSize:
    """The result for one allocation.

    Attributes:
        name: The name of the allocation's file.
        path: The packed artifact.
        size_bytes, average_bits: The artifact's size, and its code bits a weight.
        ratio: The size of the float32 parameters divided by that of the artifact.
        start_divergence, start_wer: Results on the held-out data before the training: bounded divergence from the float
            model, nats per frame (or token of an attention decoder), and WER of greedy CTC, a fraction (None without
            transcripts).
        divergence, wer: The same results for the artifact.
        dev: ((divergence, wer), ...) after each epoch, the starting weights first.
        stretch: The factor by which the steps of entropy-coded weights were stretched, so that the artifact keeps its
            size; 1 if they were not.
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
    stretch: float = 1.0


@dataclass(frozen=True)
class FinetuneResult:
    """`mpq.finetune/1`: the result of a finished fine-tuning.

    Attributes:
        fingerprint: The digest of the inputs: model, allocations, options and data.
        checkpoint: {"path", "sha256"} of the float model.
        sizes: One for each allocation, the largest first.
        epochs: The epochs trained, after the starting weights as epoch 0; dev figures are means over the allocations.
        averaged: The epochs whose weights the artifacts have.
        utterances, hours, transcribed: The size of the training data, and the number of utterances with a transcript.
        skipped, too_long: The numbers of utterances that were left out as faulty, and as longer than `max_seconds`.
        seed: The key of all random choices.
        seconds: Wall-clock time of all epochs.
        device, processes: The device that was used, and the number of processes.
        inputs: All that the result depends on, as in `mpq.identity.Inputs`.
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
