"""Second-order scores of all layers and widths against the exact divergence of a part of them: time for a point.

    python tests/bench_fisher.py MODEL.nemo DATA.jsonl [--seconds 300] [--every 24]

Both use the same audio and the same rounding (gptq). The exact divergence is measured for every 24th point; its time
for a point, times the number of points, over the whole time of the scores is the ratio that counts. The statistics,
which both need, are timed apart.
"""

import time
from pathlib import Path

import click

from mpq.artifact.weights import WeightFormat
from mpq.loading import load_model
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw, in_batches, one_by_one
from mpq.sensitivity.fisher import fisher_scores, rounding_errors
from mpq.sensitivity.measure import measure_kl
from mpq.sensitivity.statistics import input_grams

WIDTHS = (2, 3, 4, 5, 6, 8)


@click.command()
@click.argument("checkpoint")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--seconds", default=300.0)
@click.option("--every", default=24)
def main(checkpoint: str, data: Path, seconds: float, every: int) -> None:
    model = load_model(checkpoint)
    drawn = draw(model, data, seconds)
    weight_format = WeightFormat(QuantSpec(8, rounding="gptq"))
    single, batched = one_by_one(model, drawn), in_batches(model, drawn, 40.0)
    points = [(ref.name, bits) for ref in model.weights() for bits in WIDTHS]
    print(f"{len(points)} points, {sum(drawn.durations):.0f} s of audio")
    start = time.perf_counter()
    grams = input_grams(model, single)
    collected = time.perf_counter()
    errors = rounding_errors(model, weight_format, WIDTHS, grams)
    rounded = time.perf_counter()
    for pair in single:
        fisher_scores(model, errors, *pair)
    scored = time.perf_counter()
    print(
        f"statistics {collected - start:.1f} s; scores of all points: rounding {rounded - collected:.1f} s + backward "
        f"passes {scored - rounded:.1f} s"
    )
    part = points[::every]
    measure_kl(model, batched, part, weight_format, grams=grams)
    exact = (time.perf_counter() - scored) * len(points) / len(part)
    print(f"exact: {len(part)} points in {exact * len(part) / len(points):.1f} s, so {exact:.0f} s for all")
    alone, together = exact / (scored - collected), (exact + collected - start) / (scored - start)
    print(f"the scores are {alone:.1f} times faster, {together:.1f} with the statistics counted for both")


if __name__ == "__main__":
    main()
