"""Word error rates by where the allocation comes from and how weights are rounded, over several calibration draws.

    python recipes/read_speech/rounding.py MODEL.nemo DATA_FOLDER RUN_FOLDER [--draws 5] [--kl SENSITIVITY.json ...]

Every allocation is solved for the same code bits a weight; a cell is the mean WER over the draws of calibration audio,
with the standard deviation between them. Development data are evaluated for every row, test data for the last two.
Finished cells are kept in RUN_FOLDER/rounding.journal, so that a run that was cut off goes on. A file of `--kl` is one
that `mpq sensitivity --method kl` wrote; it adds a row with its rounding (of draw 0).
"""

import hashlib
import statistics as stats
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

import mpq
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat, quantize_layer
from mpq.files import sha256_file
from mpq.journal import Journal
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.quantization.spec import QuantSpec
from mpq.scoring.metrics import score
from mpq.scoring.significance import align
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.fisher import fisher_scores, typical_scores
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable
from mpq.sensitivity.statistics import input_statistics
from mpq.speech.data import batches, prepare_data, read_batch
from mpq.speech.trn import split_words

WIDTHS = (2, 3, 4, 5, 6, 8)
SIZES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
NEAREST, GPTQ = (WeightFormat(QuantSpec(8, rounding=rounding)) for rounding in ("nearest", "gptq"))
Weights = dict[str, dict[int, Tensor]]


class Bench:
    """The model, the evaluation data as batches, and the finished cells."""

    def __init__(self, checkpoint: Path, data: Path, run: Path, seconds: float) -> None:
        self.model, self.sha256 = load_model(checkpoint), sha256_file(checkpoint)
        self.refs = self.model.weights()
        self.parameters = dict(self.model.named_parameters())
        self.original = {ref.name: self.parameters[ref.name].data for ref in self.refs}
        self.parts = {part: _batches(self.model, data / f"{part}.jsonl") for part in ("dev", "test")}
        manifests = [sha256_file(data / f"{part}.jsonl") for part in ("train", "dev", "test")]
        code = [sha256_file(path) for path in sorted(Path(mpq.__file__).parent.rglob("*.py"))]
        work = [self.sha256, sha256_file(Path(__file__)), seconds, *manifests, *code]
        fingerprint = hashlib.sha256(repr(work).encode()).hexdigest()
        self.journal = Journal(run / "rounding.journal", fingerprint)
        self.journal.begin()
        self.cells = {tuple(entry["cell"]): entry["wer"] for entry in self.journal.read()}

    def wer(self, part: str, row: str, size: float, seed: int, weights: Weights, bits: Mapping[str, int]) -> None:
        """Evaluates one cell, unless it is finished."""
        cell = (part, row, size, seed)
        if cell in self.cells:
            return
        for name, width in bits.items():
            self.parameters[name].data = weights[name][width]
        alignments = []
        with torch.inference_mode():
            for texts, features in self.parts[part]:
                encoded, lengths = self.model.encode(*features)
                tokens = self.model.greedy(encoded, lengths)
                outputs = map(self.model.tokenizer.decode, tokens)
                alignments += [align(*map(split_words, pair)) for pair in zip(texts, outputs, strict=True)]
        for name, weight in self.original.items():
            self.parameters[name].data = weight
        self.cells[cell] = 100 * score(row, alignments).wer
        self.journal.append({"cell": cell, "wer": self.cells[cell]})
        print(f"{part}, {row}, {size:g} bits, draw {seed}: {self.cells[cell]:.2f}", flush=True)

    def solved(self, scores: Mapping[str, Sequence[float]], size: float) -> dict[str, int]:
        """Returns the bits of every layer under an average, from scores at each of WIDTHS."""
        layers = tuple(
            LayerSensitivity(
                ref.name,
                ref.kind,
                ref.shape,
                ref.numel,
                {bits: ref.numel * bits // 8 for bits in WIDTHS},
                dict(zip(WIDTHS, map(float, scores[ref.name]), strict=True)),
            )
            for ref in self.refs
        )
        return allocate(SensitivityTable(layers, WIDTHS, 0), average_bits=size).bits

    def rounded(self, weight_format: WeightFormat, grams: Mapping[str, Tensor]) -> Weights:
        """Returns every weight at every width."""
        return {
            name: dict(zip(WIDTHS, quantize_layer(name, weight, weight_format, WIDTHS, grams), strict=True))
            for name, weight in self.original.items()
        }


def _batches(model: AsrModel, data: Path) -> list[tuple[list[str], tuple[Tensor, Tensor]]]:
    """Returns the texts and features of batches of at most 60 s."""
    checked = prepare_data(data, model, need_text=True)
    found = []
    for batch in batches(checked.utterances, checked.durations, 60.0):
        with torch.inference_mode():
            found.append(([item.text or "" for item in batch], model.features(*read_batch(batch, model.sample_rate))))
    return found


def per_utterance_scores(bench: Bench, data, weights: Sequence[Weights], seed: int) -> list[dict[str, list[float]]]:
    """Returns the typical Fisher scores of the rounding errors of several sets of weights, from the same passes."""
    errors = {
        name: [(some[name][bits] - weight).flatten() for some in weights for bits in WIDTHS]
        for name, weight in bench.original.items()
    }
    results = [fisher_scores(bench.model, errors, *pair, seed) for pair in one_by_one(bench.model, data)]
    sums = torch.stack([scores for scores, _ in results])  # (U, L, sets x W)
    table, _, _ = typical_scores(sums, torch.tensor([frames for _, frames in results]))
    parts = table.split(len(WIDTHS), dim=1)
    return [dict(zip(bench.original, part.tolist(), strict=True)) for part in parts]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--draws", default=5, show_default=True, help="Number of draws of calibration audio.")
@click.option("--seconds", default=300.0, show_default=True, help="Seconds of audio in each draw.")
@click.option("--kl", multiple=True, type=click.Path(path_type=Path), help="A file of `mpq sensitivity --method kl`.")
def main(checkpoint: Path, data: Path, run: Path, draws: int, seconds: float, kl: tuple[Path, ...]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    bench = Bench(checkpoint, data, run, seconds)
    nearest = bench.rounded(NEAREST, {})
    uniform = {bits: dict.fromkeys(bench.original, bits) for bits in (2, 3, 4, 5)}
    for size, bits in uniform.items():
        bench.wer("dev", "uniform, nearest", size, 0, nearest, bits)
    by_weight = {
        name: [float((some[bits] - bench.original[name]).square().sum()) for bits in WIDTHS]
        for name, some in nearest.items()
    }
    for size in SIZES[1:]:
        bench.wer("dev", "weight error alone, nearest", size, 0, nearest, bench.solved(by_weight, size))
    for seed in range(draws):
        drawn = draw(bench.model, data / "train.jsonl", seconds, seed)
        gptq = bench.rounded(GPTQ, input_statistics(bench.model, bench.sha256, drawn, GPTQ))
        of_nearest, of_gptq = per_utterance_scores(bench, drawn, [nearest, gptq], seed)
        for path in kl if seed == 0 else ():
            table = SensitivityTable.load(path)
            rounding = table.quantizer["rounding"]
            scores = {layer.name: [layer.kl[bits] for bits in WIDTHS] for layer in table.layers}
            row = f"exact one-at-a-time KL (Eq. 7), {table.data['utterances']} utterances of {path.name}, {rounding}"
            for size in SIZES[1:]:
                weights = gptq if rounding == "gptq" else nearest
                bench.wer("dev", row, size, 0, weights, bench.solved(scores, size))
        for size, bits in uniform.items():
            for part in ("dev", "test"):
                bench.wer(part, "uniform, gptq", size, seed, gptq, bits)
        for size in SIZES[1:]:
            bench.wer("dev", "fisher, nearest", size, seed, nearest, bench.solved(of_nearest, size))
            bench.wer("dev", "fisher of nearest, gptq", size, seed, gptq, bench.solved(of_nearest, size))
            for part in ("dev", "test"):
                bench.wer(part, "fisher, gptq (the default)", size, seed, gptq, bench.solved(of_gptq, size))
    for part in ("dev", "test"):
        print(f"\n| {part} | {' | '.join(f'{size:g}' for size in SIZES)} |\n|---{'|---' * len(SIZES)}|")
        for row in dict.fromkeys(cell[1] for cell in bench.cells if cell[0] == part):
            texts = []
            for size in SIZES:
                found = [wer for cell, wer in bench.cells.items() if cell[:3] == (part, row, size)]
                mean = f"{stats.mean(found):.2f}" if found else ""
                texts.append(mean + (f" ± {stats.stdev(found):.2f}" if len(found) > 1 else ""))
            print(f"| {row} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
