"""Word errors by scheme and file size, on several test sets and over several draws of calibration audio.

    python recipes/librispeech_small/sizes.py MODEL.nemo CALIBRATION.jsonl RUN_FOLDER --on NAME=MANIFEST [--on ...]
        [--schemes entropy,asymmetric,mulaw,uniform] [--megabytes 3.3,3.9] [--draws 3] [--seconds 600]

Every file is measured, allocated and packed by what `mpq sensitivity`, `allocate` and `pack` call; its words are those
of the model that is read back from the file. A size is a bound in MB of 10^6 bytes; "uniform" has a width for all
layers instead (scheme asymmetric, gptq). Finished cells are kept in RUN_FOLDER/sizes.journal, packed files in
RUN_FOLDER, so that a run that was cut off goes on, and cells that are known take no time.

The table has, for each set, the mean WER over the draws (and the deviation between them; * where a draw is
significantly worse than the float model), the smallest p of those that are worse, otherwise of all, the largest
one-sided 95 % bound of how much worse a file is, in points, and the mean divergence in nats a frame (bounded).
"""

import statistics as stats
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from mpq.allocation.pack import pack
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.files import digest
from mpq.identity import file_sha256
from mpq.journal import Journal
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.quantization.spec import scheme_and_widths
from mpq.scoring.metrics import score
from mpq.scoring.significance import align, mapsswe, segments
from mpq.scoring.verdicts import non_inferiority
from mpq.sensitivity.divergence import bounded_kl
from mpq.sensitivity.measure import measure_sensitivity
from mpq.sensitivity.records import SensitivityTable
from mpq.speech.data import batches, prepare_data, read_batch
from mpq.speech.trn import split_words

UNIFORM = (2, 3, 4)


@dataclass(frozen=True)
class Heard:
    """What a model makes of a test set: an alignment for each utterance, log-probabilities of each batch's frames."""

    alignments: list[str]
    log_probs: list[Tensor]


def words_of(alignments: Sequence[str]) -> int:
    """Returns the number of reference words."""
    return sum(len(one) - one.count("I") for one in alignments)


class TestSet:
    """A test set as features, and what the float model makes of it."""

    def __init__(self, model: AsrModel, manifest: Path) -> None:
        checked = prepare_data(manifest, model, need_text=True)
        self.batches = []
        for batch in batches(checked.utterances, checked.durations, 60.0):
            with torch.inference_mode():
                features = model.features(*read_batch(batch, model.sample_rate))
            self.batches.append(([item.text or "" for item in batch], features))
        self.reference = self.heard(model)

    @torch.inference_mode()
    def heard(self, model: AsrModel) -> Heard:
        """Returns what a model makes of it by greedy search."""
        alignments: list[str] = []
        log_probs = []
        for texts, features in self.batches:
            encoded, lengths = model.encode(*features)
            outputs = map(model.tokenizer.decode, model.greedy(encoded, lengths))
            alignments += [align(*map(split_words, pair)) for pair in zip(texts, outputs, strict=True)]
            found = model.ctc_log_probs(encoded)
            log_probs.append(found[torch.arange(found.shape[1]) < lengths[:, None]])
        return Heard(alignments, log_probs)

    def own(self) -> dict[str, Any]:
        """Returns the figures of the float model."""
        alignments = self.reference.alignments
        return {"wer": 100 * score("", alignments).wer, "words": words_of(alignments)}

    def judged(self, model: AsrModel) -> dict[str, Any]:
        """Returns the figures of a packed model."""
        found = self.heard(model)
        pairs = zip(self.reference.alignments, found.alignments, strict=True)
        errors = [pair for both in pairs for pair in segments(*both)]
        logs = zip(self.reference.log_probs, found.log_probs, strict=True)
        kl = torch.cat([bounded_kl(one.double(), other.double()) for one, other in logs])
        test, bound = mapsswe(errors), non_inferiority(errors, words_of(self.reference.alignments))
        return {
            "wer": 100 * score("", found.alignments).wer,
            "p": test.p,
            "is_worse": test.better == "a",
            "upper": None if bound.upper is None else 100 * bound.upper,
            "kl": float(kl.mean()),
        }


def packed_file(
    checkpoint: Path, calibration: Path, run: Path, scheme: str, size: float, draw: int, seconds: float
) -> Path:
    """Returns the packed file of a cell, made if it is not there."""
    path = run / f"{scheme}-{size:g}-draw{draw}.safetensors"
    if path.exists():
        return path
    if scheme == "uniform":
        options = {"data": calibration, "max_seconds": seconds, "seed": draw}
        pack(checkpoint, path, None, int(size), held_out_seconds=0, **options)
        return path
    table = measured(checkpoint, calibration, run, scheme, draw, seconds)
    pack(checkpoint, path, allocate(table, target_bytes=round(size * 1e6)), held_out_seconds=0)
    return path


def measured(
    checkpoint: Path, calibration: Path, run: Path, scheme: str, draw: int, seconds: float
) -> SensitivityTable:
    """Returns the sensitivities of a draw, measured unless they are there."""
    weight_format = WeightFormat.from_options({"scheme": scheme})
    _, widths = scheme_and_widths(scheme, None, None)
    out = run / f"{scheme}-draw{draw}.json"
    return measure_sensitivity(checkpoint, calibration, widths, out, weight_format, max_seconds=seconds, seed=draw)


def row(scheme: str, size: float, cells: Sequence[Mapping[str, Any]], names: Sequence[str], full: int) -> str:
    """Returns a line of the table: the means over the draws."""
    bytes_ = stats.mean(cell["bytes"] for cell in cells)
    label = f"{size:g} bits" if scheme == "uniform" else f"{size:g} MB"
    parts = [scheme, label, str(len(cells)), f"{bytes_:.0f}", f"{full / bytes_:.2f}"]
    for name in names:
        found = [cell["sets"][name] for cell in cells]
        wers = [one["wer"] for one in found]
        spread = f" ± {stats.stdev(wers):.2f}" if len(wers) > 1 else ""
        worst = min((one["p"] for one in found if one["is_worse"]), default=None)
        p = min(one["p"] for one in found) if worst is None else worst
        uppers = [one["upper"] for one in found if one["upper"] is not None]
        kl = stats.mean(one["kl"] for one in found)
        parts.append(f"{stats.mean(wers):.2f}{spread}{'*' if worst is not None else ''}")
        parts += [f"{p:.4f}", f"{max(uppers):+.2f}" if uppers else "", f"{kl:.4f}"]
    return "| " + " | ".join(parts) + " |"


@click.command(help=__doc__)
@click.argument("checkpoint", type=Path)
@click.argument("calibration", type=Path)
@click.argument("run", type=Path)
@click.option("--on", multiple=True, required=True, metavar="NAME=MANIFEST")
@click.option("--schemes", default="entropy,asymmetric,mulaw,uniform")
@click.option("--megabytes", default="3.3,3.9,4.4,4.9,5.7,6.5,7")
@click.option("--draws", default=3)
@click.option("--seconds", default=600.0)
def main(
    checkpoint: Path,
    calibration: Path,
    run: Path,
    on: tuple[str, ...],
    schemes: str,
    megabytes: str,
    draws: int,
    seconds: float,
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    manifests = {name: Path(path) for name, path in (one.split("=", 1) for one in on)}
    journal = Journal(run / "sizes.journal", digest([file_sha256(checkpoint), file_sha256(calibration), seconds]))
    journal.begin()
    cells = {tuple(entry["cell"]): entry for entry in journal.read()}

    @cache
    def float_model() -> AsrModel:
        return load_model(checkpoint)

    @cache
    def test_set(name: str) -> TestSet:
        return TestSet(float_model(), manifests[name])

    def cell(key: tuple[str, float, int]) -> Mapping[str, Any]:
        """Returns a cell's figures on all sets; those that are not known are measured."""
        known = cells.get(key, {"bytes": 0, "sets": {}})
        missing = [name for name in manifests if name not in known["sets"]]
        if missing and key[0] == "float32":
            found = {name: test_set(name).own() for name in missing}
            size = 4 * float_model().parameter_counts()["total"]
        elif missing:
            path = packed_file(checkpoint, calibration, run, *key, seconds)
            packed, size = load_model(path), path.stat().st_size
            found = {name: test_set(name).judged(packed) for name in missing}
        if missing:
            cells[key] = {"cell": list(key), "bytes": size, "sets": known["sets"] | found}
            journal.append(cells[key])
        return cells[key]

    full = cell(("float32", 32, 0))
    for name in manifests:
        print(f"{name}: {full['sets'][name]['words']} words, float32 {full['sets'][name]['wer']:.2f} %")
    heads = " | ".join(f"{name} WER % | p | worse by at most | divergence" for name in manifests)
    print(f"\n| scheme | size | draws | bytes | times smaller | {heads} |")
    print("|---" * (5 + 4 * len(manifests)) + "|", flush=True)
    for scheme in schemes.split(","):
        for size in map(float, UNIFORM) if scheme == "uniform" else map(float, megabytes.split(",")):
            try:
                found = [cell((scheme, size, draw)) for draw in range(draws)]
            except MpqError as error:
                print(f"| {scheme} | {size:g} | {error} |", flush=True)
                continue
            print(row(scheme, size, found, list(manifests), full["bytes"]), flush=True)


if __name__ == "__main__":
    main()
