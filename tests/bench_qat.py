"""What a step of quantization-aware training costs, as a ratio to the plain training step of the same model and batch.

    python tests/bench_qat.py MODEL [--seconds 3] [--utterances 16] [--threads 2] [--precision float32]

A step is the forward pass, the CTC loss of made-up transcripts, the backward pass and Adam. The steps take turns, so
that whatever else the machine does meets all of them; the medians over the rounds are compared. Searches for clip
ratios and mu, which are made every so many steps, are timed apart and shared out.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from mpq.artifact.weights import WeightFormat
from mpq.config import FinetuneConfig
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.loading import load_model
from mpq.models.heads import Targets, ctc_loss
from mpq.quantization.spec import QuantSpec
from mpq.runtime import keep_freed_memory
from mpq.training.distillation import Distillation
from mpq.training.optimization import choose_precision


class _Plain(nn.Module):
    """The model as it is, and the CTC loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, frames: Tensor, targets: Targets) -> Tensor:
        encoded, lengths = self.model.encode(features, frames)
        log_probs = self.model.head("ctc").logits(encoded, None).float().log_softmax(dim=-1)
        return ctc_loss(log_probs, lengths, targets, self.model.blank_id)


class _Quantized(nn.Module):
    """The same with quantized weights."""

    def __init__(self, plain: _Plain, weights: QuantizedWeights) -> None:
        super().__init__()
        self.plain, self.weights = plain, weights

    def forward(self, *batch: object) -> Tensor:
        weights = {f"model.{name}": weight for name, weight in self.weights().items()}
        return torch.func.functional_call(self.plain, weights, batch)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--seconds", default=3.0, show_default=True, help="Of each utterance.")
@click.option("--utterances", default=16, show_default=True, help="In a batch.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--precision", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--device", default="cpu", show_default=True)
def main(path: Path, seconds: float, utterances: int, rounds: int, threads: int, precision: str, device: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as every training of mpq does
    where = torch.device(device)
    half, scaler = choose_precision(precision, where)
    teacher = load_model(path, where)
    samples = int(seconds * teacher.sample_rate)
    waveforms = 0.1 * torch.randn(utterances, samples, device=where)
    features, frames = teacher.features(waveforms, torch.full((utterances,), samples, device=where))
    tokens = [torch.randint(teacher.blank_id, (int(3 * seconds),)).tolist() for _ in range(utterances)]
    targets = Targets.of(tokens).to(where)

    def quantized(scheme: str, scales: str) -> QuantizedWeights:
        widths = [2, 3, 4]
        state = teacher.state_dict()
        weights = {ref.name: state[ref.name].cpu() for ref in teacher.weights()}
        bits = {name: widths[index % 3] for index, name in enumerate(weights)}
        return QuantizedWeights(weights, [bits], WeightFormat(QuantSpec(8, scheme=scheme)), {}, scales).to(where)

    def step(module: nn.Module, trained: list[Tensor], loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(trained, lr=1e-6, fused=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(where.type, half, enabled=half is not None):
                value = loss()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()

        return run

    steps: dict[str, Callable[[], None]] = {}
    searches: dict[str, Callable[[], None]] = {}
    plain = _Plain(load_model(path, where))
    steps["plain"] = step(plain, list(plain.parameters()), lambda: plain(features, frames, targets).sum())
    for name, scheme, scales in (
        ("straight-through, learned scales", "asymmetric", "learned"),
        ("straight-through, recomputed scales", "asymmetric", "recomputed"),
        ("straight-through, frozen scales", "asymmetric", "frozen"),
        ("straight-through, entropy-coded, learned scales", "entropy", "learned"),
        ("General Quantizer", "mulaw", "frozen"),
    ):
        module = _Quantized(_Plain(load_model(path, where)), quantized(scheme, scales))
        module.weights.anneal(100.0, is_hard=False)
        rest = {name for name, _ in module.plain.model.named_parameters()} - set(module.weights.names)
        parameters = dict(module.plain.model.named_parameters())
        for one in module.weights.names:
            parameters[one].requires_grad_(False)
        trained = [*module.weights.parameters(), *(parameters[one] for one in rest)]
        if name in ("straight-through, recomputed scales", "General Quantizer"):
            searches[name] = module.weights.search
        steps[name] = step(module, trained, lambda module=module: module(features, frames, targets).sum())
    student = load_model(path, where)
    weights = quantized("asymmetric", "learned")
    for one in student.parameters():
        one.requires_grad_(False)
    distilled = Distillation(
        student, weights, teacher, bound=1.0, label_smoothing=0.0, has_hidden=True, has_transcripts=False
    )
    known = torch.ones(utterances, dtype=torch.bool, device=where)

    def distillation() -> Tensor:
        found = distilled(features, features, frames, targets, known, 0)
        return (found.kl["ctc"] + found.hidden).sum()

    steps["learned scales, distillation (the teacher's forward pass too)"] = step(
        distilled, list(weights.parameters()), distillation
    )
    search_seconds = {}
    for name, search in searches.items():
        start = time.perf_counter()
        search()
        search_seconds[name] = time.perf_counter() - start
    seconds_taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, run in steps.items():
            if where.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if where.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                seconds_taken[name].append(time.perf_counter() - start)
    every = FinetuneConfig().search_every
    base = statistics.median(seconds_taken["plain"])
    print(f"{path.name}, {utterances} x {seconds:g} s, {precision}, {threads} threads, {rounds} rounds")
    for name, found in seconds_taken.items():
        step_seconds, note = statistics.median(found), ""
        if name in search_seconds:
            step_seconds += search_seconds[name] / every
            note = f" (with a {every}th of a search of {search_seconds[name]:.1f} s)"
        print(f"{1e3 * step_seconds:8.0f} ms  {step_seconds / base:6.2f}  {name}{note}")


if __name__ == "__main__":
    main()
