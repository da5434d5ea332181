"""What the quantizer options do to a real model: WER and size with every weight at one width.

    python tests/bench_quantizers.py MODEL.nemo DEV.jsonl [--bits 4,3] [--scheme mulaw]
    python tests/bench_quantizers.py MODEL.nemo [--bits 4,3,2]

Without data: the errors of the weights, not those of the transcripts.

The defaults of mpq were chosen from this table (docs/quantizers.md). Choose on development data, never on test data.
"""

import itertools

import click
import torch

from mpq.artifact.file import fixed_bytes
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import SCHEMES, QuantSpec
from mpq.scoring.metrics import measure
from mpq.speech.data import batches, prepare_data, read_batch

OPTIONS = [
    ("symmetric", "tensor", "none"),
    ("symmetric", "channel", "none"),
    ("symmetric", "channel", "mse"),
    ("symmetric", "group:64", "mse"),
    ("asymmetric", "channel", "none"),
    ("asymmetric", "channel", "percentile:99"),
    ("asymmetric", "channel", "mae"),
    ("asymmetric", "channel", "mse"),
    ("asymmetric", "group:128", "mse"),
    ("asymmetric", "group:64", "none"),
    ("asymmetric", "group:64", "mae"),
    ("asymmetric", "group:64", "mse"),
    ("asymmetric", "group:32", "mse"),
    ("asymmetric", "group:16", "mse"),
    ("mulaw", "channel", "none"),
    ("mulaw", "channel", "mse"),
    ("mulaw", "group:64", "none"),
    ("mulaw", "group:64", "mse"),
]


def weight_errors(model: AsrModel, widths: list[int]) -> None:
    """Prints ||quantized - w|| / ||w|| of each scheme: the root of the mean over all weight tensors of its square."""
    state = model.state_dict()
    weights = [state[ref.name] for ref in model.weights()]
    print(f"| granularity | clip | bits | {' | '.join(SCHEMES)} |\n|---|---|---|{'---|' * len(SCHEMES)}")
    for granularity, clip, width in itertools.product(("channel", "group:64"), ("none", "mse"), widths):
        cells = []
        for scheme in SCHEMES:
            spec = QuantSpec(width, scheme, granularity, clip)
            squares = [
                float((fake_quantize(weight, spec) - weight).square().sum() / weight.square().sum())
                for weight in weights
            ]
            cells.append(f"{100 * (sum(squares) / len(squares)) ** 0.5:.1f} %")
        print(f"| {granularity} | {clip} | {width} | {' | '.join(cells)} |", flush=True)


@click.command()
@click.argument("checkpoint")
@click.argument("data", required=False)
@click.option("--bits", default="4,3")
@click.option("--scheme", help="Of the quantized rows; default: all.")
def main(checkpoint: str, data: str | None, bits: str, scheme: str | None) -> None:
    model = load_model(checkpoint)
    widths = [int(width) for width in bits.split(",")]
    if data is None:
        weight_errors(model, widths)
        return
    checked = prepare_data(data, model, need_text=True)
    groups = batches(checked.utterances, checked.durations, 60)
    waveforms = [read_batch(group, model.sample_rate) for group in groups]
    order = [utterance for group in groups for utterance in group]
    seconds = dict(zip((u.utt_id for u in checked.utterances), checked.durations, strict=True))
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refs = model.weights()

    def row(label: str, size: int) -> None:
        texts = [text for batch in waveforms for text in model.transcribe(*batch)]
        m = measure([u.utt_id for u in order], [u.text for u in order], texts, [seconds[u.utt_id] for u in order])
        errors = f"{m.substitutions} S {m.deletions} D {m.insertions} I"
        print(f"| {label} | {size / 2**20:.3f} | {100 * m.wer:.2f} | {errors} |", flush=True)

    print(
        "| bits | scheme | granularity | clip | scales | file MB | WER % | errors |\n|---|---|---|---|---|---|---|---|"
    )
    total = 4 * model.parameter_counts()["total"]
    row("32 | | | | ", total)
    half = WeightFormat(QuantSpec(8))
    model.load_state_dict(
        {
            name: t.half().float() if t.is_floating_point() and not name.startswith("preprocessor") else t
            for name, t in original.items()
        }
    )
    row("16 (everything) | | | | ", fixed_bytes(model, half) + sum(layer_bytes(ref.shape, 16, half) for ref in refs))
    names = {ref.name for ref in refs}
    model.load_state_dict(
        {
            name: t
            if name in names or not t.is_floating_point() or name.startswith("preprocessor")
            else t.half().float()
            for name, t in original.items()
        }
    )
    row("32, the rest (biases, norms) 16 | | | | ", fixed_bytes(model, half) + sum(4 * ref.numel for ref in refs))
    for width, (kind, granularity, clip) in itertools.product(widths, OPTIONS):
        if scheme not in (None, kind):
            continue
        scales = ["float16", "float32"] if (granularity, clip) == ("group:64", "mse") else ["float16"]
        for scale_dtype in scales:
            spec = QuantSpec(width, kind, granularity, clip, scale_dtype=scale_dtype)
            weight_format = WeightFormat(spec)
            state = dict(original)
            for ref in refs:
                state[ref.name] = fake_quantize(original[ref.name], spec)
            model.load_state_dict(state)
            size = fixed_bytes(model, weight_format) + sum(layer_bytes(ref.shape, width, weight_format) for ref in refs)
            row(f"{width} | {kind} | {granularity} | {clip} | {scale_dtype}", size)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
