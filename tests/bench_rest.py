"""Biases, norms and statistics in few bytes: what they take, and what they do to the output, by the precision kept.

    python tests/bench_rest.py MODEL.nemo DEV.jsonl --seconds 500

For each precision (`mpq.artifact.rest.encode_rest`) the bytes of everything that is stored so, and the bounded
divergence of the output, nats per row: of the model with float weights, and of models whose weights are rounded to 5
and 6 bits as well (asymmetric, group:64, nearest). The lines "float32" and "float16" leave the vectors as they are, and
in half precision. Word errors are those of greedy search.
"""

import copy
from pathlib import Path

import click
import torch
from torch import Tensor

from mpq.artifact.rest import decode_rest, encode_rest
from mpq.artifact.tokenizer import encode_tokenizer
from mpq.coding.compression import compressed
from mpq.loading import load_model
from mpq.models.base import AsrModel, is_counter, load_state
from mpq.models.folding import folded_state
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.scoring.significance import align, count_errors
from mpq.sensitivity.divergence import bounded_kl, log_probs_of_outputs
from mpq.speech.data import batches, calibration_subset, prepare_data, read_batch

Batch = tuple[Tensor, Tensor, list[str]]
"""(N, T, F) features, (N,) valid frames, transcripts."""


def read(model: AsrModel, path: Path, seconds: float | None) -> list[Batch]:
    """Returns the audio of a manifest in batches, or a random part of it."""
    checked = prepare_data(path, model, need_text=True)
    utterances, durations = calibration_subset(checked.utterances, checked.durations, seconds, seed=0)
    found = []
    for batch in batches(utterances, durations, 60.0):
        with torch.inference_mode():
            features, lengths = model.features(*read_batch(batch, model.sample_rate))
        found.append((features, lengths, [utterance.text or "" for utterance in batch]))
    return found


@torch.inference_mode()
def outputs(model: AsrModel, data: list[Batch]) -> tuple[list[Tensor], float]:
    """Returns (M, V) log-probabilities of the CTC head's rows for each batch, and the word error rate."""
    found, errors, words = [], 0, 0
    for features, lengths, texts in data:
        encoded, frames = model.encode(features, lengths)
        logits = model.head("ctc").logits(encoded, None)
        valid = torch.arange(logits.shape[1]) < frames[:, None]
        found.append(log_probs_of_outputs(model)["ctc"](logits[valid].double()).float())
        for text, tokens in zip(texts, model.greedy(encoded, frames, "ctc"), strict=True):
            errors += count_errors(align(text.split(), model.tokenizer.decode(tokens).split()))
            words += len(text.split())
    return found, errors / words


def divergence(references: list[Tensor], found: list[Tensor]) -> float:
    """Returns the bounded mean divergence per row, nats."""
    pairs = list(zip(references, found, strict=True))
    return sum(float(bounded_kl(a.double(), b.double()).sum()) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def small_parts(model: AsrModel) -> None:
    """Prints the bytes of what is not trained."""
    state = model.state_dict()
    own = {name for name, _ in model.named_parameters()}
    exact = [t for n, t in state.items() if n not in own and not is_counter(n) and "running" not in n]
    data = b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in exact)
    _, blob = model.to_config()
    print(f"tokenizer {len(blob)} -> {len(encode_tokenizer(blob))} bytes, exact {len(compressed(data, True))} bytes")


@click.command(help=__doc__)
@click.argument("checkpoint", type=Path)
@click.argument("manifest", type=Path)
@click.option("--seconds", type=float, help="The most audio to use.")
@click.option("--bits", multiple=True, type=int, default=(5, 6))
@click.option("--precision", multiple=True, type=int, default=(4, 5, 6, 7, 8))
def main(
    checkpoint: Path, manifest: Path, seconds: float | None, bits: tuple[int, ...], precision: tuple[int, ...]
) -> None:
    model = load_model(checkpoint)
    small_parts(model)
    data = read(model, manifest, seconds)
    references, wer = outputs(model, data)
    folded = folded_state(model)
    refs = {ref.name for ref in model.weights()}
    trained = {name for name, _ in model.named_parameters()} | {name for name in folded if "running" in name}
    names = [name for name in folded if name in trained - refs]
    changed = copy.deepcopy(model)
    print(f"{len(names)} tensors, {sum(folded[name].numel() for name in names)} values; WER {100 * wer:.2f} %")
    print("rest      bytes  " + "  ".join(f"{f'{width}-bit weights':>22}" for width in ("float", *bits)))
    kinds: dict[str, tuple[int, dict[str, Tensor]]] = {
        "float32": (4 * sum(folded[name].numel() for name in names), {}),
        "float16": (2 * sum(folded[name].numel() for name in names), {n: folded[n].half().float() for n in names}),
    }
    for one in precision:
        stored = encode_rest(folded, names, one)
        kinds[f"2^-{one}"] = len(stored), decode_rest(stored, {name: tuple(folded[name].shape) for name in names})
    rounded = {
        width: {name: fake_quantize(folded[name], QuantSpec(width, "asymmetric", "group:64")) for name in refs}
        for width in bits
    }
    for kind, (size, rest) in kinds.items():
        line = f"{kind:8} {size:6}"
        for width in (0, *bits):
            load_state(changed, folded | rest | rounded.get(width, {}))
            found, wer = outputs(changed, data)
            line += f"   kl {divergence(references, found):.5f} WER {100 * wer:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
