"""A table with a row for each file size: allocation, word errors, significance; to be run after `mpq run`.

    python recipes/read_speech/sizes.py MODEL.nemo DATA.jsonl RUN_FOLDER 6 7 8 9 10

Every file is packed and evaluated for real; the sensitivities are those of the run in RUN_FOLDER. `u4` in place of a
size is every weight at 4 bits, rounded with the same calibration audio. Divergences are nats a frame.
"""

import sys
from pathlib import Path

from mpq.allocation.pack import pack
from mpq.allocation.solve import allocate
from mpq.scoring.compare import compare, read_evaluations
from mpq.scoring.evaluate import evaluate
from mpq.sensitivity.records import SensitivityTable


def main(model: Path, data: Path, run: Path, sizes: list[str]) -> None:
    table = SensitivityTable.load(run / "sensitivity.json")
    baseline = run / "float" / data.stem
    rows = evaluate(model, data, baseline).metrics
    columns = "file MB, times smaller, bits a weight, divergence predicted, measured, WER %, S, D, I, Z, p, lossless"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|---" * 12 + "|")
    counts = f"{rows.substitutions} | {rows.deletions} | {rows.insertions}"
    print(f"| float32 | 1 | 32 | | | {100 * rows.wer:.2f} | {counts} | | | |")
    for size in sizes:
        folder = run / f"size_{size}_{data.stem}"
        packed = run / f"size_{size}.safetensors"
        uniform = int(size.removeprefix("u")) if size.startswith("u") else None
        allocation = None if uniform else allocate(table, target_mb=float(size))
        calibration = {"data": Path(table.data["path"]), "seed": table.data["seed"]} if uniform else {}
        result = pack(model, packed, allocation, uniform, **calibration)
        evaluate(packed, data, folder)
        comparison = compare(*read_evaluations(baseline, folder), names=("float32", size))
        b, test = comparison.b, comparison.mapsswe
        predicted = "" if result.predicted_kl is None else f"{result.predicted_kl:.4f}"
        print(
            f"| {result.size_bytes / 2**20:.3f}{' (uniform)' if uniform else ''} | {result.ratio:.2f} "
            f"| {result.average_bits:.2f} | {predicted} | {result.measured_kl:.4f} "
            f"| {100 * b.wer:.2f} | {b.substitutions} | {b.deletions} | {b.insertions} "
            f"| {test.z:.2f} | {test.p:.4f} | {'yes' if comparison.lossless else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
