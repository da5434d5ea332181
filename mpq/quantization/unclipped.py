"""A grid without clipping, whose codes are entropy-coded.

A code far from zero is rare and long, so no weight has to be cut off, and the step alone decides. For a weight that is
Gaussian with standard deviation s, codes of step D have an entropy near log2(s / D) + log2(2 pi e) / 2 bits where the
step is small (Gish and Pierce 1968). The nominal rate is that number, so the step is s 2^(2.047 - rate). For s stands
mean|w| sqrt(pi / 2), which is s for a Gaussian and which a single large weight hardly moves.

Legend: as in `mpq.quantization.grids`.
"""

import math
from typing import final

import torch
from torch import Tensor

from mpq.quantization.scales import storable_scale
from mpq.quantization.spec import QuantSpec
from mpq.quantization.uniform import Uniform

UNIT_GAUSSIAN_BITS = math.log2(2 * math.pi * math.e) / 2
"""Differential entropy of a Gaussian of variance 1, bits."""


@final
class Unclipped(Uniform):
    """Levels scale * {... -1, 0, 1 ...}."""

    def bounds(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Returns the standard deviation of each group, if it were Gaussian, as its range, (C, G)."""
        size = groups.abs().mean(dim=-1, dtype=torch.float64) * math.sqrt(math.pi / 2)
        return -size.to(torch.float32), size.to(torch.float32)

    def spread(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return storable_scale(high * 2 ** (UNIT_GAUSSIAN_BITS - spec.bits), spec), torch.zeros_like(high)
