"""What the soft assignment of the General Quantizer costs: as printed (a matrix of weights x centroids) and as done.

    python tests/bench_general_quantizer.py [--threads 2]

First one kernel of 1024 x 256, forward and backward: time, and memory above what the kernel takes, each in a process
of its own. Then all 196 weights of a Conformer with 13 M parameters, as `SoftToHard` computes them in a training step.
"""

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from mpq.quantization.mu_law import mu_law_centroids
from mpq.quantization.soft_assignment import SoftToHard, soft_assign
from mpq.quantization.spec import QuantSpec

ALPHA = 100.0


def conformer_shapes() -> list[tuple[int, ...]]:
    """Returns the weights of NVIDIA's small Conformer-CTC: 16 blocks of width 176, feed-forward 704, kernel 31."""
    feed_forward = [(704, 176), (176, 704)]
    attention = [(176, 176)] * 5
    convolution = [(352, 176, 1), (176, 1, 31), (176, 176, 1)]
    block = [*feed_forward, *attention, *convolution, *feed_forward]
    return [(176, 1, 3, 3), (176, 176, 3, 3), (176, 3520), *block * 16, (1025, 176, 1)]


def dense(weights: Tensor, centroids: Tensor, alpha: float) -> Tensor:
    z = centroids.to(weights.dtype) / 128
    distances = (weights[..., None] - z).abs()
    nearest = distances.detach().amin(dim=-1, keepdim=True)  # or exp underflows
    return torch.softmax(-alpha * (distances - nearest), dim=-1) @ z


FORMS = {"dense": dense, "closed form": soft_assign}


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Returns the time of the fastest of several runs, after one to warm up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def one_kernel(form: str, bits: int, threads: int) -> tuple[float, int]:
    """Returns seconds and peak bytes of one forward and backward pass."""
    torch.set_num_threads(threads)
    weights = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)).mul_(0.3).requires_grad_()
    gradient = torch.randn(1024, 256)
    centroids = mu_law_centroids(bits, 15)
    small = weights.detach()[:8].clone().requires_grad_()
    FORMS[form](small, centroids, ALPHA).sum().backward()  # what torch loads and reserves once
    (weights * 1).backward(gradient)
    weights.grad = None
    before = peak_bytes()

    def step() -> None:
        weights.grad = None
        FORMS[form](weights, centroids, ALPHA).backward(gradient)

    step()
    peak = peak_bytes() - before
    return seconds(step, 20 if form == "closed form" else 3), peak


def model(threads: int, granularity: str, is_hard: bool) -> None:
    torch.set_num_threads(threads)
    shapes = conformer_shapes()
    weights = [torch.randn(shape).requires_grad_() for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    kernels = [SoftToHard(QuantSpec(2 + i % 7, "mulaw", granularity, "none"), mu=15.0) for i in range(len(shapes))]
    step_of = iter(range(10**6))

    def forward() -> list[Tensor]:
        alpha = ALPHA + next(step_of)  # tables are made anew, as in a training
        for kernel in kernels:
            kernel.alpha, kernel.is_hard = alpha, is_hard
        return [kernel(weight) for kernel, weight in zip(kernels, weights, strict=True)]

    def step() -> None:
        for weight in weights:
            weight.grad = None
        torch.autograd.backward(forward(), gradients)

    whole, only_forward = seconds(step, 5), seconds(lambda: forward() and None, 5)
    count = sum(weight.numel() for weight in weights)
    print(
        f"{len(shapes)} weights, {count / 1e6:.2f} M, {granularity}, {'hard' if is_hard else 'soft'}: "
        f"{1000 * whole:.0f} ms forward and backward (forward {1000 * only_forward:.0f} ms)",
        flush=True,
    )


@click.command()
@click.option("--threads", default=1, show_default=True)
def main(threads: int) -> None:
    print(f"1024 x 256, forward and backward, {threads} thread(s)")
    print("| bits | dense ms | closed form ms | ratio | dense MB | closed form MB |\n|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for bits in (2, 4, 8):
        found = []
        for form in FORMS:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                found.append(pool.submit(one_kernel, form, bits, threads).result())
        (slow, large), (fast, small) = found
        print(
            f"| {bits} | {1000 * slow:.1f} | {1000 * fast:.2f} | {slow / fast:.0f} "
            f"| {large / 2**20:.0f} | {small / 2**20:.1f} |",
            flush=True,
        )
    for granularity in ("channel", "tensor", "group:64"):
        model(threads, granularity, False)
    model(threads, "channel", True)


if __name__ == "__main__":
    main()
