"""The table of fine-tuning: word errors before and after, by size, on three test sets.

    python recipes/read_speech/finetune.py MODEL.nemo READ_SPEECH DIGITS RUN_FOLDER [--extra DATA] [--row NAME ...]

READ_SPEECH has train.jsonl, dev.jsonl and test.jsonl; DIGITS is what recipes/digits/prepare.py made (dev_clean and
test_clean, 8 kHz, which the model hears resampled): other speakers, another recording, nothing of it trained on.
Every choice was made on the development part of the read speech; each row evaluates the test sets once. Finished steps
are kept in RUN_FOLDER, so that a run that was cut off goes on, and rows can be made one at a time (`--row`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.artifact.weights import WeightFormat
from mpq.finetuning.run import finetune
from mpq.loading import PACKED_FILE, load_model
from mpq.pipeline.read import make_recipe
from mpq.quantization.spec import QuantSpec
from mpq.scoring.compare import compare, read_evaluations
from mpq.scoring.evaluate import evaluate
from mpq.scoring.records import Comparison
from mpq.sensitivity.measure import measure_sensitivity
from mpq.sensitivity.records import SensitivityTable

WIDTHS = [1, 2, 3, 4, 5, 6, 8]


@dataclass(frozen=True)
class Row:
    """A row of the table, which is one model.

    Attributes:
        name: The row's name.
        bits: Average code bits a weight.
        is_uniform: Whether all layers have that width, instead of an allocation.
        scheme, rounding: The weight format.
        epochs: Epochs of the fine-tuning; None: the model is not fine-tuned.
        options: Other options of the fine-tuning, "section.key=value".
    """

    name: str
    bits: float
    is_uniform: bool = False
    scheme: str = "asymmetric"
    rounding: str = "gptq"
    epochs: int | None = None
    options: tuple[str, ...] = ()

    @property
    def start(self) -> str:
        """The name of the row's allocation."""
        return f"{self.scheme}-{self.rounding}-{'uniform' if self.is_uniform else 'mixed'}-{self.bits:g}"


OPTIONS = (
    "finetune.precision=bfloat16",  # two thirds of the time on a processor that has it
    "finetune_augment.speed=[0.9,1.0,1.1]",
)
"""Options of every fine-tuned row, beside the defaults."""
FASTER = ("finetune.scale_rate=0.002", "finetune.rest_rate=1e-4")
TUNED = (
    ("mixed 4, fine-tuned", 4, 3, ("finetune.learning_rate=0.002",)),
    ("mixed 3, fine-tuned", 3, 6, ("finetune.learning_rate=0.006",)),
    ("mixed 3, fine-tuned slowly", 3, 3, ("finetune.learning_rate=0.002",)),
    ("mixed 2.5, fine-tuned", 2.5, 6, ("finetune.learning_rate=0.004", *FASTER)),
    ("mixed 2, fine-tuned", 2, 6, ("finetune.learning_rate=0.006", *FASTER)),
)
"""(name, bits, epochs, other options)"""

ROWS = (
    Row("float32", 32),
    *(Row(f"uniform {bits}, nearest", bits, True, rounding="nearest") for bits in (4, 2)),
    *(Row(f"uniform {bits}, gptq", bits, True) for bits in (4, 2)),
    *(Row(f"mixed {bits:g}", bits) for bits in (4, 3, 2.5, 2)),
    *(Row(name, bits, epochs=epochs, options=more) for name, bits, epochs, more in TUNED),
    Row("mulaw mixed 3", 3, scheme="mulaw", rounding="nearest"),
    Row("mulaw mixed 3, General Quantizer", 3, False, "mulaw", "nearest", 4, ("finetune.learning_rate=0.006",)),
)


class Table:
    """The rows, which are made in a folder.

    Args:
        checkpoint: The float model.
        speech, digits: The folders of the data.
        run: The folder for all results.
        extra: More audio to train on.
    """

    def __init__(self, checkpoint: Path, speech: Path, digits: Path, run: Path, extra: Sequence[Path]) -> None:
        self.checkpoint, self.run = checkpoint, run
        self.train, self.dev = [speech / "train.jsonl", *extra], speech / "dev.jsonl"
        self.tests = {"dev": self.dev, "test": speech / "test.jsonl", "digits": digits / "test_clean.jsonl"}

    def allocation(self, row: Row) -> Path:
        """Returns the allocation file of a row."""
        path = self.run / f"{row.start}.json"
        if path.exists():
            return path
        table = self.run / f"{row.scheme}-{row.rounding}.sensitivity.json"
        if not table.exists():
            weight_format = WeightFormat(QuantSpec(8, scheme=row.scheme, rounding=row.rounding))
            measure_sensitivity(self.checkpoint, self.train[0], WIDTHS, table, weight_format)
        allocate(SensitivityTable.load(table), average_bits=row.bits).save(path)
        return path

    def model(self, row: Row) -> Path:
        """Returns the file of a row's model, which is made if it is not there."""
        if row.name == "float32":
            return self.checkpoint
        if row.epochs is not None:
            paths = {"train": [str(path.absolute()) for path in self.train], "dev": str(self.dev.absolute())}
            recipe = make_recipe(
                {"data": paths}, [f"finetune.epochs={row.epochs}", *OPTIONS, *row.options], "finetune.py"
            )
            finetune(self.checkpoint, [self.allocation(row)], recipe, self.run / row.name)
            return self.run / row.name / PACKED_FILE
        path = self.run / f"{row.name}.safetensors"
        if path.exists():
            return path
        if row.is_uniform:
            calibration = self.train[0] if row.rounding == "gptq" else None
            pack(self.checkpoint, path, bits=int(row.bits), data=calibration)
        else:
            pack(self.checkpoint, path, Allocation.load(self.allocation(row)))
        return path

    def scores(self, row: Row) -> tuple[int, dict[str, Comparison]]:
        """Returns the size of a row's file (0 for float32), and on each set its errors and the test against float32."""
        model, found = self.model(row), {}
        for name, data in self.tests.items():
            folders = [self.run / "evaluations" / one / name for one in ("float32", row.name)]
            for path, folder in zip((self.checkpoint, model), folders, strict=True):
                if not (folder / "metrics.json").exists():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    evaluate(path, data, folder)
            found[name] = compare(*read_evaluations(*folders), names=("float32", row.name))
        return (0 if row.name == "float32" else model.stat().st_size), found


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("speech", type=click.Path(path_type=Path))
@click.argument("digits", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--row", "names", multiple=True, help="Name of a row to make; default: all.")
@click.option("--extra", multiple=True, type=click.Path(path_type=Path), help="More audio to train on (a manifest).")
def main(
    checkpoint: Path,
    speech: Path,
    digits: Path,
    run: Path,
    names: tuple[str, ...],
    extra: tuple[Path, ...],
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    table = Table(checkpoint, speech, digits, run, extra)
    heads = "".join(f" {name} WER % (S D I) | p |" for name in table.tests)
    print(f"| model | bytes | times smaller |{heads}\n|---{'|---' * (2 + 2 * len(table.tests))}|")
    full = 4 * load_model(checkpoint).parameter_counts()["total"]
    for row in ROWS:
        if names and row.name not in names:
            continue
        size, found = table.scores(row)
        cells = ""
        for comparison in found.values():
            b, p = comparison.b, comparison.mapsswe.p
            verdict = "" if row.name == "float32" or p is None else f"{p:.3f}{'' if comparison.lossless else ' *'}"
            cells += f" {100 * b.wer:.2f} ({b.substitutions} {b.deletions} {b.insertions}) | {verdict} |"
        sizes = f"{size} | {full / size:.2f}" if size else f"{full} | 1"
        print(f"| {row.name} | {sizes} |{cells}", flush=True)


if __name__ == "__main__":
    main()
