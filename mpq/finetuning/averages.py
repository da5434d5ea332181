"""Averages of trained weights: the running one over updates, and the mean over epochs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def follow(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, step: int) -> None:
    """Moves running averages, in place, towards the tensors after an update.

    Args:
        averages, tensors: The averages and the tensors that they follow, in one order.
        decay: The share of an average that stays; it is less in the first updates, so that the start does not linger.
        step: The number of the update, from 0.
    """
    decay = min(decay, (step + 1) / (step + 10))
    get_ema_multi_avg_fn(decay)(averages, [one.detach() for one in tensors], step)  # type: ignore[no-untyped-call]


@contextmanager
def swapped(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Puts the values of `others`, if there are any, in the place of those of `tensors` within the block."""
    if not others:
        yield
        return
    own = [one.detach().clone() for one in tensors]
    _copy(others, tensors)
    try:
        yield
    finally:
        _copy(own, tensors)


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def mean_weights(paths: Sequence[Path], is_averaged: Callable[[str], bool]) -> dict[str, Tensor]:
    """Returns the mean of the tensors of files, by name; a tensor that is not averaged is that of the first file.

    Args:
        paths: safetensors files of the same names.
        is_averaged: Says whether the tensor of a name is averaged, if it is of floating point.
    """
    parts = [load_file(path) for path in paths]
    for name, tensor in parts[0].items():
        if tensor.is_floating_point() and is_averaged(name):
            parts[0][name] = torch.stack([part[name].double() for part in parts]).mean(dim=0).float()
    return parts[0]
