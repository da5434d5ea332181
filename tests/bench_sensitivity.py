"""Prefix caching against whole forward passes: the same numbers, in what share of the time.

    python tests/bench_sensitivity.py MODEL.nemo DATA.jsonl [--seconds 20] [--bits 4]

Both measure every layer at one width on the same batches, in turn, in one process; the ratio is what counts.
"""

import time

import click
import torch

from mpq.artifact.weights import WeightFormat
from mpq.loading import load_model
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.measure import mean_kl, measure_kl
from mpq.speech.data import batches, calibration_subset, prepare_data, read_batch


def whole_forwards(model, data, points, spec: QuantSpec) -> dict:
    """Eq. 7 with nothing cached but the original distribution."""

    def distributions() -> list[torch.Tensor]:
        rows = []
        for features, lengths in data:
            encoded, encoded_lengths = model.encode(features, lengths)
            valid = torch.arange(encoded.shape[1]) < encoded_lengths[:, None]
            rows.append(model.ctc_log_probs(encoded)[valid].double().log_softmax(dim=-1))
        return rows

    parameters = dict(model.named_parameters())
    results = {}
    with torch.inference_mode():
        reference = distributions()
        for name, bits in points:
            original = parameters[name].data
            parameters[name].data = fake_quantize(original, spec)
            results[name, bits] = mean_kl(zip(reference, distributions(), strict=True))
            parameters[name].data = original
    return results


@click.command()
@click.argument("checkpoint")
@click.argument("data")
@click.option("--seconds", default=20.0)
@click.option("--bits", default=4)
@click.option("--rounds", default=3)
def main(checkpoint: str, data: str, seconds: float, bits: int, rounds: int) -> None:
    model = load_model(checkpoint)
    checked = prepare_data(data, model)
    chosen = calibration_subset(checked.utterances, checked.durations, seconds, 0)
    with torch.inference_mode():
        features = [model.features(*read_batch(batch, model.sample_rate)) for batch in batches(*chosen, 40.0)]
    points = [(ref.name, bits) for ref in model.weights()]
    spec = QuantSpec(bits)
    print(f"{len(points)} points, {sum(chosen[1]):.1f} s of audio, {torch.get_num_threads()} threads")
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        whole = whole_forwards(model, features, points, spec)
        middle = time.perf_counter()
        cached = measure_kl(model, features, points, WeightFormat(spec))
        end = time.perf_counter()
        ratios.append((middle - start) / (end - middle))
        print(
            f"whole forwards {middle - start:.1f} s, prefix caching {end - middle:.1f} s: {ratios[-1]:.2f} times faster"
        )
    worst = max(abs(cached[point] - whole[point]) / (whole[point] + 1e-9) for point in points)
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}; largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
