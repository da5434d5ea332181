"""The rounding of one weight in a forward pass, and the gradient that passes it.

The training changes a *latent* weight; the model sees its rounding (Li et al. 2023, section 6: quantization-aware
training with the straight-through estimator, Bengio et al. 2013). The gradient passes the rounding as if it were the
identity inside the clipping range, and is 0 outside. What the model sees is `dequantize` of the codes that `quantized`
gives, bit for bit, so the weights that were trained are the weights in the packed file.

A latent is counted in *units* of the step of its grid at the start, one unit for each group: the same learning rate
then means the same number of rounding steps in every layer, whatever its bit-width. It starts inside the interval of
the code that the start's rounding chose (GPTQ's codes are not the nearest), at the point next to the trained weight.

Scales are frozen, or recomputed from the latents in each pass with the clip ratio of the last search (Rybakov et al.
2023), or learned (LSQ, Esser et al. 2020): scale = start * exp(log_scale), a parameter for each group, whose gradient
is that of LSQ, sum of (code - zero point - [inside] * weight / scale), times the scale. Zero points are not learned.

Legend: C rows (output channels), K columns, G groups of `size` columns a row, as in `mpq.quantization.grids`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpq.quantization.grids import Rounded, choose_clip, clipped_grid, matrix_shape, nearest_codes, split_groups
from mpq.quantization.quantizers import Quantized, as_stored
from mpq.quantization.scales import storable_scale
from mpq.quantization.spec import QuantSpec, Scales

MARGIN = 0.1
"""The least distance of a latent, at the start, from the border of its code's interval, in rounding steps."""


class StraightThrough(nn.Module):
    """The quantizer of one weight at one bit-width: latent -> the weight that the model sees.

    Args:
        spec: The quantizer.
        unit: (C, G): what a latent of 1 stands for.
        start: The grid to start from.
        scales: "learned", "recomputed" or "frozen".
    """

    unit: Tensor
    scale: Tensor
    zero_point: Tensor
    clip_ratio: Tensor

    def __init__(self, spec: QuantSpec, unit: Tensor, start: Quantized, scales: Scales) -> None:
        super().__init__()
        self.spec, self.scales, self.shape = spec, scales, tuple(start.codes.shape)
        self.register_buffer("unit", unit.clone())
        self.register_buffer("scale", start.scale.clone())
        zero_point = torch.zeros_like(start.scale) if start.zero_point is None else start.zero_point.to(torch.float32)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("clip_ratio", torch.ones_like(start.scale))
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale)) if scales == "learned" else None

    def forward(self, latent: Tensor) -> Tensor:
        """Returns the (C, K) rounded weight of a (C, K) latent."""
        if self.scales == "recomputed":
            self._recompute(latent.detach())
        rounded: Tensor = _RoundThrough.apply(latent, self.log_scale, self)  # type: ignore[no-untyped-call]  # torch's
        return rounded

    @torch.no_grad()
    def search(self, latent: Tensor) -> None:
        """Searches the clip ratios for the present latent, if scales are recomputed."""
        if self.scales == "recomputed":
            for groups, part in _groups(self._exact(latent), self.spec):
                self.clip_ratio[:, part] = choose_clip(groups, self.spec)
            self._recompute(latent)

    @torch.no_grad()
    def quantized(self, latent: Tensor) -> Quantized:
        """Returns the codes, scales and zero points of the weight that `forward` returns."""
        if self.scales == "recomputed":
            self._recompute(latent)
        scale = self.current_scale()
        codes = torch.empty_like(latent)
        for (groups, part), (into, _) in zip(_groups(latent, self.spec), _groups(codes, self.spec), strict=True):
            into.copy_(self._codes(groups, scale[:, part], part))
        return as_stored(self.shape, self.spec, Rounded(codes, scale, self.zero_point), None)

    def as_weight(self, latent: Tensor) -> Tensor:
        """Returns a latent in the weight's own units and shape."""
        parts = [groups * self.unit[:, part, None] for groups, part in _groups(latent, self.spec)]
        return torch.cat([part.reshape(len(latent), -1) for part in parts], dim=1).reshape(self.shape)

    def current_scale(self) -> Tensor:
        """Returns the (C, G) scales as they would be stored now."""
        if self.log_scale is None:
            return self.scale
        return storable_scale(self.scale * self.log_scale.detach().exp(), self.spec)

    def _codes(self, groups: Tensor, scale: Tensor, part: slice) -> Tensor:
        """Returns the (C, G', size) codes of latents; scale (C, G') is that of the groups `part`."""
        return nearest_codes(groups, scale / self.unit[:, part], self.zero_point[:, part], self.spec)

    def _recompute(self, latent: Tensor) -> None:
        grids = [
            clipped_grid(groups, self.spec, self.clip_ratio[:, part])
            for groups, part in _groups(self._exact(latent), self.spec)
        ]
        self.scale, self.zero_point = (torch.cat(values, dim=1) for values in zip(*grids, strict=True))

    def _exact(self, latent: Tensor) -> Tensor:
        """Returns the (C, K) weight that a latent stands for."""
        return self.as_weight(latent.detach()).reshape(latent.shape)


class _RoundThrough(torch.autograd.Function):
    """The rounding of a latent, and the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, log_scale: Tensor | None, quantizer: StraightThrough) -> Tensor:
        scale = quantizer.current_scale()
        weight = torch.empty_like(latent)
        for (groups, part), (into, _) in zip(
            _groups(latent, quantizer.spec), _groups(weight, quantizer.spec), strict=True
        ):
            codes = quantizer._codes(groups, scale[:, part], part)
            torch.mul(codes.sub_(quantizer.zero_point[:, part, None]), scale[:, part, None], out=into)
        ctx.save_for_backward(latent, weight, scale, quantizer.unit)
        ctx.spec, ctx.learned = quantizer.spec, log_scale is not None
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        latent, weight, scale, unit = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_latent = torch.empty_like(latent)
        to_scale = torch.empty_like(scale) if ctx.learned else None
        # a weight is outside where it is farther from its level than half the distance of levels, so beyond the last
        reach = scale * ((1.0 if ctx.spec.is_sign else 0.5) * (1 + 1e-5))
        for found in zip(*(_groups(one, ctx.spec) for one in (latent, weight, gradient, to_latent)), strict=True):
            (x, part), (rounded, _), (g, _), (into, _) = found
            units = unit[:, part, None]
            error = torch.addcmul(rounded, x, units, value=-1)  # of the rounding
            inside = error.abs() <= reach[:, part, None]
            if to_scale is not None:
                # sign(w) * scale: which sign does not depend on the scale
                slope = rounded if ctx.spec.is_sign else torch.where(inside, error, rounded)
                to_scale[:, part] = (slope * g).sum(dim=-1)
            torch.mul(g, inside, out=into).mul_(units)
        return to_latent, to_scale, None


def start_latent(weight: Tensor, spec: QuantSpec, start: Quantized, unit: Tensor, keep_codes: bool) -> Tensor:
    """Returns the (C, K) latent in units: the weight, moved into the interval of its code if codes are kept."""
    rows, columns = matrix_shape(tuple(weight.shape), spec)
    levels = start.codes.reshape(rows, columns).to(torch.float32)
    latent = weight.detach().to(torch.float32).reshape(rows, columns).clone()
    for (groups, part), (level, _) in zip(_groups(latent, spec), _groups(levels, spec), strict=True):
        if start.zero_point is not None:
            level.sub_(start.zero_point[:, part, None])
        groups.div_(unit[:, part, None])
        if not keep_codes:
            continue
        if spec.is_sign:
            groups.copy_(torch.where(level > 0, groups.clamp(min=MARGIN), groups.clamp(max=-MARGIN)))
        else:
            groups.copy_(torch.minimum(torch.maximum(groups, level - 0.5 + MARGIN), level + 0.5 - MARGIN))
    return latent


def _groups(matrix: Tensor, spec: QuantSpec) -> Iterator[tuple[Tensor, slice]]:
    """Yields views (C, G', size) of a (C, K) matrix, and which groups they are."""
    start = 0
    for part in split_groups(matrix, spec):
        yield part, slice(start, start + part.shape[1])
        start += part.shape[1]
