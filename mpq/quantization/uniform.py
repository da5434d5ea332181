"""Evenly spaced levels: symmetric around zero, or with a zero point.

Symmetric levels are those of Li et al. 2023, Eq. 5-6 (with the step max|w| / (2^(n-1) - 1), so that the levels span the
weights), asymmetric ones those of Rybakov et al. 2023. Codes are rounded to nearest, ties to even, by multiplication
with 1 / scale: as torch's own fake-quantize operators, to which the results are equal for the same scales.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mpq.quantization.levels import Levels
from mpq.quantization.scales import range_around_zero, range_with_zero, storable_scale
from mpq.quantization.spec import QuantSpec


class Uniform(Levels):
    """The common part of the schemes with evenly spaced levels."""

    def centroids(self, parts: Sequence[Tensor], spec: QuantSpec) -> None:
        return None

    def nearest(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        if spec.is_sign:
            return torch.where(groups >= 0, 1.0, -1.0)
        codes = torch.round(groups * scale.reciprocal()[..., None])
        return codes.add_(zero_point[..., None]).clamp_(spec.codes[0], spec.codes[-1])

    def rounded(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        return self.nearest(groups, scale, zero_point, spec, centroids).sub_(zero_point[..., None])

    def of(self, codes: Tensor, spec: QuantSpec, centroids: Tensor | None) -> Tensor:
        return codes.to(torch.float32)


@final
class Symmetric(Uniform):
    """Levels scale * {-(2^(n-1)-1) ... 2^(n-1)-1}; at 1 bit scale * {-1, 1}."""

    def bounds(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return range_around_zero(groups, spec)

    def spread(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return storable_scale(high / spec.codes[-1], spec), torch.zeros_like(high)


@final
class Asymmetric(Uniform):
    """Levels scale * ({0 ... 2^n-1} - zero_point)."""

    def bounds(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return range_with_zero(groups, spec)

    def spread(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        q_min, q_max = spec.codes[0], spec.codes[-1]
        scale = storable_scale((high - low) / (q_max - q_min), spec)
        return scale, torch.round(-low / scale).clamp_(q_min, q_max)
