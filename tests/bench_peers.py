"""mpq's bit allocation against a peer's: `auto_quantize` of NVIDIA Model Optimizer, at the same true file sizes.

    pip install nvidia-modelopt huggingface_hub requests
    python tests/bench_peers.py MODEL.nemo TRAIN.jsonl DEV.jsonl RUN_FOLDER --sensitivity sens.json 105

Both score the same layers at the same widths on the same calibration audio. For each of the peer's size constraints,
its {weight: bits} is packed by mpq; then mpq allocates under exactly the bytes which that file takes. So the files of a
pair have the same quantizer and the same size and differ in the assignment alone. Each is read back and measured:
divergence with all layers quantized together, on audio that no method saw, plain and with no frame counting more than
1 nat, and word errors.

What the peer computes (nvidia-modelopt 0.47.0, modelopt/torch/quantization/algorithms.py):

- `gradient` (its default): one forward and backward pass of a loss for each batch. With the float weights in place,
  each layer's output is also computed at each width from the same float input. score = the sum over batches and all
  output elements of (dloss/doutput * change of the output)^2: a Taylor expansion in the layer's output, whose Hessian
  is replaced by the diagonal of the empirical Fisher information. An integer program (PuLP, CBC) then minimises the sum
  of scores under the size.
- `kl_div`: one whole forward pass for each layer, width and batch; score = the sum over frames of KL(float || changed)
  with that layer alone quantized: times the number of frames, what `mpq sensitivity` measures. But the scores are not
  summed: a threshold is bisected (100 steps), and each layer takes its smallest width with a score at or below it. So
  the largest score of any layer is minimised, whatever the layers' sizes.
- Both: a wider format's score is at most a narrower one's (a running minimum); "not quantized" is always a candidate
  with score 0 and 16 bits; size = weights x num_bits, without scales.

Choices made here, so that the peer gets all it needs:

- Formats: weights only, `num_bits` n and `block_sizes` {-1: 64} (symmetric; where 64 does not divide a row, the short
  group comes first), `algorithm` "mse" (its own search of the range). `--grid mpq` scores on mpq's grids instead,
  rounded to nearest, through a registered quantizer backend: then only scores and solver differ.
- The peer quantizes a weight where its module's own forward uses it, and so does not see mpq's pointwise convolutions
  (F.linear with the weight of a Conv1d): they would score 0 and get the fewest bits. In its copy of the model they are
  nn.Linear. Conv2d keeps its kernels as rows of a matrix, so that 64 consecutive weights share a scale as in mpq, not
  the 3 of a kernel's row. The outputs must be the same, and every score above 0; both are checked.
- A layer that it leaves unquantized is packed at 16 bits (column "16" counts them); mpq has no such candidate.
- One utterance is one batch, without padding. The loss is the summed CTC loss of the transcript, a log-likelihood, for
  which the peer's documentation calls the scores correct. mpq uses no transcript.
- Weights alone need no calibration data, so the peer's calibration passes run on one utterance. Its seconds are those
  of `auto_quantize` as a whole, model and audio in memory; mpq's are what the command line says.
"""

import contextlib
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import modelopt
import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import QuantLinearConvBase, register_quant_backend
from torch import Tensor, nn

from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.artifact.file import fixed_bytes
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.files import sha256_file
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import FLOAT_BITS
from mpq.scoring.evaluate import evaluate
from mpq.sensitivity.records import SensitivityTable
from mpq.speech.data import batches, calibration_subset, prepare_data, read_batch

METHODS, GRIDS = ("gradient", "kl_div"), ("modelopt", "mpq")


@dataclass(frozen=True)
class Utterance:
    """One batch of the peer: (1, T, F) features, (1,) valid frames, (U,) tokens of the transcript."""

    features: Tensor
    lengths: Tensor
    tokens: Tensor


class RowsConv2d(nn.Conv2d):
    """A Conv2d whose weight is the (C, K) matrix that mpq quantizes."""

    def __init__(self, like: nn.Conv2d) -> None:
        channels = (like.in_channels, like.out_channels, like.kernel_size)
        super().__init__(*channels, like.stride, like.padding, groups=like.groups)
        self.shape = like.weight.shape
        self.weight, self.bias = nn.Parameter(like.weight.data.flatten(1)), like.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(self.shape), self.bias, self.stride, self.padding, groups=self.groups)


class QuantRowsConv2d(QuantLinearConvBase):
    """What the peer makes of it: `weight` is quantized inside `forward`."""


mtq.register(RowsConv2d, QuantRowsConv2d)


def peer_model(checkpoint: Path) -> AsrModel:
    """Returns the model with every weight where the peer looks for it; run it inside `peer_forward`."""
    model = load_model(checkpoint)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
            linear = nn.Linear(module.in_channels, module.out_channels)
            linear.weight, linear.bias = nn.Parameter(module.weight.data.squeeze(2)), module.bias
            setattr(model.get_submodule(parent), child, linear)
        elif isinstance(module, nn.Conv2d):
            setattr(model.get_submodule(parent), child, RowsConv2d(module))
    (head,) = (module for module in model.decoder.modules() if isinstance(module, nn.Linear))
    model.decoder.forward = lambda x: head(x)
    return model


def peer_forward(model: AsrModel, batch: Utterance) -> Tensor:
    """Returns the (1, T', V) logits."""
    with patch("mpq.models.conformer._pointwise", lambda layer, x: layer(x)):
        return model.head("ctc").logits(model.encode(batch.features, batch.lengths)[0], None)


def peer_format(bits: int, grid: str) -> dict[str, Any]:
    """Returns the peer's weight-only format of one width, in groups of 64."""
    weights = {"num_bits": bits, "block_sizes": {-1: 64}} | ({"backend": "mpq"} if grid == "mpq" else {})
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": weights}]
    return {"quant_cfg": rules, "algorithm": "max" if grid == "mpq" else "mse"}


def use_grids_of_mpq(weight_format: WeightFormat) -> None:
    """Registers a backend whose quantized weights are mpq's; each is computed once."""
    known: dict[nn.Module, Tensor] = {}

    def backend(weight: Tensor, quantizer: nn.Module) -> Tensor:
        if quantizer not in known:
            spec = replace(weight_format.spec, bits=quantizer.num_bits, rounding="nearest")
            known[quantizer] = fake_quantize(weight.detach(), spec)
        return known[quantizer]

    register_quant_backend("mpq", backend)


def peer_scores(
    checkpoint: Path, data: Sequence[Utterance], widths: Sequence[int], method: str, grid: str, cache: Path
) -> tuple[dict[str, Any], float]:
    """Returns the peer's search state, scores included, and the seconds that it took.

    The state is kept in `cache` (the peer's own search checkpoint), so that a second run only solves.
    """
    original, model = load_model(checkpoint), peer_model(checkpoint)
    with torch.no_grad():
        logits = original.head("ctc").logits(original.encode(data[0].features, data[0].lengths)[0], None)
        torch.testing.assert_close(peer_forward(model, data[0]), logits, rtol=1e-3, atol=1e-3)

    def loss(logits: Tensor, batch: Utterance) -> Tensor:
        log_probs = logits[0].log_softmax(dim=-1)  # (T', V)
        return F.ctc_loss(log_probs, batch.tokens, (len(log_probs),), (len(batch.tokens),), model.blank_id, "sum")

    took = cache.with_suffix(".json")
    if not took.exists():
        cache.unlink(missing_ok=True)  # of a run that was killed: the peer cannot go on from it
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": max(widths)},
            quantization_formats=[peer_format(bits, grid) for bits in widths],
            data_loader=data,
            forward_step=peer_forward,
            loss_func=loss if method == "gradient" else None,
            num_calib_steps=1,
            num_score_steps=len(data),
            method=method,
            checkpoint=str(cache),
        )
    seconds = time.perf_counter() - start
    if not took.exists():
        took.write_text(json.dumps({"seconds": seconds}))
    return state, json.loads(took.read_text())["seconds"]


def peer_assignment(state: dict[str, Any], effective_bits: float, names: Sequence[str], float_bits: int) -> dict:
    """Returns {weight: bits} under the peer's size constraint."""
    stats = {name.removesuffix("quant_recipe") + "weight": stat for name, stat in state["candidate_stats"].items()}
    assert sorted(stats) == sorted(names), "a decision for every weight, and for nothing else"
    unseen = [name for name, stat in stats.items() if not stat["scores"][0] > 0]
    assert not unseen, f"weights that the peer does not see: {unseen}"
    bits = {
        entry["quantizer_name"].removesuffix("weight_quantizer") + "weight": entry["cfg"]["num_bits"]
        for entry in mtq.get_auto_quantize_config(state, {"effective_bits": effective_bits})["quant_cfg"]
        if entry["quantizer_name"].endswith(".weight_quantizer") and entry["enable"]
    }
    return {name: bits.get(name, float_bits) for name in names}


class Bench:
    """Packs, reads back and measures; prints a row for each file.

    Args:
        checkpoint: The float model.
        dev: Manifest for the word errors, and for the divergence.
        seconds: How much of it is used for the divergence.
        run: Folder for the files.
    """

    def __init__(self, checkpoint: Path, dev: Path, seconds: float, run: Path) -> None:
        self.checkpoint, self.dev, self.run = checkpoint, dev, run
        model = load_model(checkpoint)
        checked = prepare_data(dev, model)
        chosen = calibration_subset(checked.utterances, checked.durations, seconds, 0)
        self.heldout = [read_batch(batch, model.sample_rate) for batch in batches(*chosen, 40.0)]
        self.reference = self._log_probs(model)
        print(f"joint KL on {sum(chosen[1]):.0f} s of {dev.name}; {torch.get_num_threads()} threads\n")
        columns = (
            "assignment, effective bits, file bytes, bits a weight, 16, scoring s, joint KL, bounded, WER %, errors"
        )
        print(f"| {columns.replace(', ', ' | ')} |")
        print("|---" * 10 + "|")
        self._row(("float32", "", checkpoint.stat().st_size, "32.00", "", ""), checkpoint)

    def pack_and_measure(self, name: str, budget: str, scoring_seconds: float, allocation: Allocation) -> None:
        path = self.run / "packed.safetensors"
        packed = pack(self.checkpoint, path, allocation=allocation)
        assert packed.size_bytes == path.stat().st_size == allocation.predicted_bytes
        unquantized = sum(bits in FLOAT_BITS for bits in allocation.bits.values())
        bits = f"{packed.average_bits:.2f}"
        self._row((name, budget, packed.size_bytes, bits, unquantized, f"{scoring_seconds:.0f}"), path)

    def _row(self, cells: tuple[Any, ...], path: Path) -> None:
        changed = self._log_probs(load_model(path))
        kl = F.kl_div(changed, self.reference, reduction="none", log_target=True).sum(dim=-1)  # (M,)
        divergences = (f"{kl.mean():.4f}", f"{kl.clamp(max=1).mean():.4f}")
        metrics = evaluate(path, self.dev, self.run / "eval", quiet=True).metrics
        errors = f"{metrics.substitutions} S {metrics.deletions} D {metrics.insertions} I"
        print("|", " | ".join(map(str, (*cells, *divergences, f"{100 * metrics.wer:.2f}", errors))), "|", flush=True)

    @torch.inference_mode()
    def _log_probs(self, model: AsrModel) -> Tensor:
        """Returns the (M, V) float64 log-probabilities of all valid frames."""
        rows = []
        for batch in self.heldout:
            encoded, lengths = model.encode(*model.features(*batch))
            valid = torch.arange(encoded.shape[1]) < lengths[:, None]
            rows.append(model.ctc_log_probs(encoded)[valid].double().log_softmax(dim=-1))
        return torch.cat(rows)


@click.command()
@click.argument("checkpoint", type=Path)
@click.argument("train", type=Path)
@click.argument("dev", type=Path)
@click.argument("run", type=Path)
@click.option(
    "--sensitivity", "files", type=(Path, float), multiple=True, required=True, metavar="FILE SECONDS", help="mpq's."
)
@click.option("--effective-bits", "budgets", type=float, multiple=True, default=(2.5, 3.0, 3.5, 4.0, 5.0))
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@click.option("--grid", "grids", type=click.Choice(GRIDS), multiple=True, default=GRIDS)
@click.option("--seconds", default=60.0, help="Calibration audio; the sensitivities must be of the same.")
@click.option("--seed", default=0, help="Of its choice.")
@click.option("--heldout-seconds", default=120.0, help="Audio of DEV for the divergence.")
def main(checkpoint, train, dev, run, files, budgets, methods, grids, seconds, seed, heldout_seconds) -> None:
    run.mkdir(parents=True, exist_ok=True)
    model = load_model(checkpoint)
    refs = model.weights()
    names = [ref.name for ref in refs]
    checked = prepare_data(train, model, need_text=True)
    chosen = calibration_subset(checked.utterances, checked.durations, seconds, seed)
    tables = [(SensitivityTable.load(path), path.stem, took) for path, took in files]
    widths, quantizer = tables[0][0].bits, tables[0][0].quantizer
    audio = {"utterances": len(chosen[0]), "seconds": round(math.fsum(chosen[1]), 3), "seed": seed}
    for table, name, _ in tables:
        found = {key: table.data.get(key) for key in audio}
        if (table.bits, table.quantizer, found) != (widths, quantizer, audio):
            raise click.ClickException(
                f"{name}: expected {widths}, {quantizer}, {audio}; got {table.bits}, {table.quantizer}, {found}"
            )
    weight_format = WeightFormat.from_json(quantizer)
    use_grids_of_mpq(weight_format)
    fixed = fixed_bytes(model, weight_format)
    data = []
    with torch.no_grad():
        for utterance in chosen[0]:
            features, lengths = model.features(*read_batch([utterance], model.sample_rate))
            data.append(Utterance(features, lengths, torch.tensor(model.tokenizer.encode(utterance.text))))
    print(f"nvidia-modelopt {modelopt.__version__}, torch {torch.__version__}; {len(refs)} weights at {widths} bits")
    print(f"scored on {len(data)} utterances, {audio['seconds']:.1f} s of {train.name}")
    bench = Bench(checkpoint, dev, heldout_seconds, run)

    def pair(name: str, budget: str, scoring_seconds: float, bits: dict[str, int]) -> None:
        """Measures an assignment, and mpq's own within the same bytes."""
        size = fixed + sum(layer_bytes(ref.shape, bits[ref.name], weight_format) for ref in refs)
        ours = [(f"mpq {name}", took, allocate(table, target_bytes=size)) for table, name, took in tables]
        bench.pack_and_measure(name, budget, scoring_seconds, replace(ours[0][2], bits=bits, predicted_bytes=size))
        for label, took, allocation in ours:
            bench.pack_and_measure(label, "", took, allocation)

    for width in (width for width in widths if width in budgets):
        pair(f"uniform {width}", "", 0.0, dict.fromkeys(names, width))
    scored = {"rounding": "nearest", "bits": widths, "utterances": [item.utt_id for item in chosen[0]]}
    scored = quantizer | scored | {"checkpoint": sha256_file(checkpoint), "peer": modelopt.__version__}
    key = hashlib.sha256(json.dumps(scored, sort_keys=True).encode()).hexdigest()[:12]
    for grid, method in itertools.product(grids, methods):
        state, took = peer_scores(checkpoint, data, widths, method, grid, run / f"modelopt-{method}-{grid}-{key}.pth")
        for budget in budgets:
            bits = peer_assignment(state, budget, names, weight_format.float_bits)
            pair(f"modelopt {method}, {grid} grids", f"{budget:g}", took, bits)


if __name__ == "__main__":
    main()
