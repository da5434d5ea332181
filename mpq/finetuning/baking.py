"""Rounded weights are given to the model, in steps at which their file keeps its size.

Where codes are entropy-coded, the training changes them, and with them the bytes that they take; what an allocation
promised is kept all the same. If the file would be larger, all steps of the allocation are stretched by the smallest
factor 2^(k / 64) at which it fits: a factor of two takes about one bit from each code. The next passes of the training
see these steps too, until they are chosen anew.
"""

from bisect import bisect_left
from collections.abc import Callable

import torch

from mpq.allocation.assignment import Assignment
from mpq.artifact.file import size_slack
from mpq.artifact.sizes import file_bytes
from mpq.errors import MpqError
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.models.base import AsrModel

AN_OCTAVE = 64
"""Factors to choose from in a factor of two; with neighbours, codes differ by about 0.016 bits a weight."""
ESTIMATES = 5
"""How often an estimate says what to try next, before it is the middle."""
LARGEST = 8 * AN_OCTAVE
"""The exponent k of the largest factor, 256."""


def bake(student: AsrModel, weights: QuantizedWeights, allocation: int, assigned: Assignment) -> None:
    """Gives a model the rounded weights of an allocation, in steps at which its file is no larger than was promised.

    Args:
        student: The model.
        weights: The weights.
        allocation: The number of the allocation.
        assigned: The allocation, with the size that it promised.

    Raises:
        MpqError: A weight or scale went astray, or no steps make the file small enough.
    """

    def size() -> int:
        _give(student, weights, allocation)  # which what is folded into biases depends on
        return file_bytes(student, assigned.bits, assigned.weight_format, weights.quantized(allocation))

    if assigned.weight_format.spec.record.is_entropy_coded and assigned.size_bytes is not None:
        keep_size(weights, allocation, size, assigned.size_bytes + size_slack(student, assigned.weight_format))
    _give(student, weights, allocation)


@torch.no_grad()
def _give(student: AsrModel, weights: QuantizedWeights, allocation: int) -> None:
    parameters = dict(student.named_parameters())
    for name, weight in weights.rounded(allocation).items():
        parameters[name].copy_(weight)


@torch.no_grad()
def keep_size(weights: QuantizedWeights, allocation: int, size: Callable[[], int], most: int) -> None:
    """Stretches the steps of an allocation, as little as needed; not at all where there is no need.

    The factor is smallest in the sense that the next smaller one does not fit. Coding all weights takes long, so an
    estimate says where to begin.

    Args:
        weights: The weights, whose codes are entropy-coded.
        allocation: The number of the allocation.
        size: Returns the bytes of the file with the weights as they are now.
        most: The bytes that are allowed.

    Raises:
        MpqError: No factor makes the weights small enough.
    """

    def stretch(k: int) -> None:
        weights.stretch(allocation, 2 ** (k / AN_OCTAVE))

    def excess(k: int) -> int:
        stretch(k)
        return size() - most

    def estimate(k: int) -> float:
        stretch(k)
        return float(weights.coded_bits(allocation))

    k, above = 0, excess(0)
    if above <= 0:
        return
    too_small, fits, tries = 0, LARGEST + 1, 0
    while too_small + 1 < fits:
        between, tries = range(too_small + 1, fits), tries + 1
        place = len(between) // 2  # where the estimate has led astray
        if tries <= ESTIMATES:
            goal = estimate(k) - 8 * above
            place = min(bisect_left(between, True, key=lambda one: estimate(one) <= goal), len(between) - 1)
        k = between[place]
        above = excess(k)
        too_small, fits = (k, fits) if above > 0 else (too_small, k)
    if fits > LARGEST:
        raise MpqError(f"the weights cannot be coded in a file of {most} bytes, however coarse their steps are")
    stretch(fits)
