"""What a step of an architecture search costs, as a ratio to a plain training step of the widest network.

    python tests/bench_search.py [--size digits|paper] [--seconds 3] [--utterances 16] [--threads 1] [--rounds 9]

Plain, sampled path (stage 1): forward pass, joint loss, backward pass and AdamW of all weights. Sum of all candidates
(stage 2): the same of the logits alone, in eval mode. The supernet and the plain model have the same largest sizes, and
the steps take turns in one process, so that whatever else the machine does meets all of them; medians over the rounds.
A sampled path draws another architecture in each round, the same ones whatever the number of candidates.
"""

import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch
from torch import Tensor

from mpq.config import FeaturesConfig, ModelConfig, Recipe
from mpq.models.heads import Targets
from mpq.runtime import keep_freed_memory
from mpq.search.loop import BETAS
from mpq.search.space import ModuleSpace
from mpq.search.supernet import Supernet
from mpq.speech.text import WordTokenizer
from mpq.training.building import build_model
from mpq.training.losses import JointLoss
from mpq.training.optimization import make_optimizer

SIZES = {
    "digits": (
        {"layers": 6, "width": 96, "ffn_width": 384, "kernel_size": 15, "subsampling": "dw_striding",
         "subsampling_channels": 64, "decoder_layers": 2, "decoder_ffn_width": 384},
        {"sample_rate": 8000, "n_mels": 40},
    ),
    "paper": (
        {"layers": 4, "width": 256, "ffn_width": 4096, "decoder_layers": 2, "dropout": 0.1},
        {"sample_rate": 16000, "n_mels": 80},
    ),
}  # fmt: skip
COUNTS = (2, 9, 25, 97)


def candidates(largest: int, count: int) -> tuple[int, ...]:
    """Returns a quarter of the largest to all of it, in equal steps."""
    return tuple(sorted({max(1, round(one)) for one in np.linspace(largest / 4, largest, count)}))


@click.command()
@click.option("--size", default="digits", show_default=True, type=click.Choice(list(SIZES)))
@click.option("--seconds", default=3.0, show_default=True, help="Of each utterance.")
@click.option("--utterances", default=16, show_default=True, help="In a batch.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(size: str, seconds: float, utterances: int, rounds: int, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as every training of mpq does
    where = torch.device(device)
    model, features = SIZES[size]
    tokenizer = WordTokenizer([str(index) for index in range(1000)])
    print(f"{size}, {utterances} x {seconds:g} s, {threads} threads, {rounds} rounds; ms, and ratio to plain training")

    def widest(rank: int) -> JointLoss:
        torch.manual_seed(0)
        recipe = Recipe(features=FeaturesConfig(**features), model=ModelConfig(**model, ffn_rank=rank))
        return JointLoss(build_model(recipe, tokenizer).to(where), 0.1)

    def measure(space: str) -> None:
        most = (model["ffn_width"], round(model["width"] * 15 / 16) if space != "widths" else 0)
        plain = widest(most[1])
        samples = int(seconds * plain.model.sample_rate)
        waveforms = 0.1 * torch.randn(utterances, samples, device=where)
        batch = plain.model.features(waveforms, torch.full((utterances,), samples, device=where))
        texts = [torch.randint(1000, (int(3 * seconds),)).tolist() for _ in range(utterances)]
        targets = Targets.of(texts).to(where)

        def step(
            loss: JointLoss, optimizer: torch.optim.Optimizer, prepare: Callable[[int], Tensor | float]
        ) -> Callable:
            def run(turn: int) -> None:
                optimizer.zero_grad(set_to_none=True)
                added = prepare(turn)
                ctc, attention = loss(*batch, targets).values()
                (0.2 * ctc.sum() + 0.8 * attention.sum() + added).backward()
                optimizer.step()

            return run

        def weights(loss: JointLoss) -> torch.optim.Optimizer:
            optimizer = make_optimizer(loss.model, 0.01, (0.9, 0.98))
            for group in optimizer.param_groups:
                group["lr"] = 1e-6
            return optimizer

        steps = {"plain": step(plain.train(), weights(plain), lambda turn: 0.0)}
        for count in COUNTS:
            one = ModuleSpace(
                candidates(most[0], count) if space != "ranks" else most[:1],
                candidates(most[1], count) if space != "widths" else most[1:],
            )
            every = [(one, one)] * model["layers"]

            def path(turn: int, supernet: Supernet, one: ModuleSpace = one) -> float:
                random = np.random.default_rng(turn)  # the same parts of the largest, of however many candidates
                for module in supernet.nested:
                    width, rank = (
                        sizes[round(float(share) * (len(sizes) - 1))]
                        for sizes, share in zip((one.widths, one.ranks), random.random(2), strict=True)
                    )
                    module.be_one(width, rank)
                return 0.0

            loss = widest(most[1])
            supernet = Supernet(loss.model, every)
            steps[f"path of {count}"] = step(
                loss.train(), weights(loss), lambda turn, supernet=supernet: path(turn, supernet)
            )

            frozen = widest(most[1])
            relaxed = Supernet(frozen.model, every)
            for parameter in frozen.parameters():
                parameter.requires_grad_(False)

            def relax(turn: int, relaxed: Supernet = relaxed) -> Tensor:
                relaxed.be_sum(0.5, np.random.default_rng(turn))
                return relaxed.expected_millions()

            frozen.eval()
            adam = torch.optim.Adam(relaxed.arch_logits(), lr=0.2, betas=BETAS)
            steps[f"sum of {count}"] = step(frozen, adam, relax)
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 1):
            for name, run in steps.items():
                if where.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run(turn)
                if where.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first warms up
                    taken[name].append(time.perf_counter() - start)
        base = statistics.median(taken["plain"])
        for name, found in taken.items():
            print(f"{space:7} {1e3 * statistics.median(found):8.0f} ms  {statistics.median(found) / base:6.2f}  {name}")

    for space in ("widths", "ranks", "both"):
        measure(space)


if __name__ == "__main__":
    main()
