"""The rounding of a weight whose codes are entropy-coded, in a forward pass, and the gradient that passes it.

It is that of `mpq.finetuning.straight_through` on a grid without clipping, so the gradient passes everywhere. One scale
is common to the whole weight, and the steps of rows and columns are that scale times factors that stay as they are
(`mpq.quantization.steps`). A latent is counted in *units* of its own step at the start, factor included. The scale is
frozen, or learned as there.

The bytes of the weight depend on its codes. So that they keep to a size, all steps can be stretched by a common factor
(`mpq.finetuning.baking`), and there is an estimate of the bits for a loss. Codes of mean magnitude m have, if they
are geometric on both sides, an entropy of asinh(m) + m asinh(1 / m) nats, and magnitude costs asinh(1 / m) each:
P(q) = tanh(a / 2) exp(-a |q|) with sinh(a) = 1 / m.

Legend: C rows (output channels), K columns, as in `mpq.quantization.steps`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpq.finetuning.straight_through import MARGIN
from mpq.quantization.grids import Rounded, nearest_codes
from mpq.quantization.quantizers import Quantized, as_stored
from mpq.quantization.scales import storable_scale
from mpq.quantization.spec import QuantSpec, Scales
from mpq.quantization.steps import step_factors

LEAST_MEAN = 1e-9
"""The least mean magnitude that the estimate of the bits tells from zero."""


class UnclippedThrough(nn.Module):
    """The quantizer of one weight at one rate, with the interface of `straight_through.StraightThrough`.

    Args:
        spec: The quantizer, of a scheme whose codes are entropy-coded.
        unit: (1, 1): what a latent of 1 stands for where the factor is 1.
        start: The scale and the exponents to start from.
        scales: "learned" or "frozen".
    """

    unit: Tensor
    scale: Tensor
    rows: Tensor
    columns: Tensor
    factors: Tensor
    stretch: Tensor

    def __init__(self, spec: QuantSpec, unit: Tensor, start: Quantized, scales: Scales) -> None:
        super().__init__()
        self.spec, self.shape = spec, tuple(start.codes.shape)
        rows, columns = (one.clone() for one in _exponents(start))
        self.register_buffer("unit", unit.clone())
        self.register_buffer("scale", start.scale.clone())
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("factors", _factors(rows, columns))  # (C, K), or (1, K) where all rows are alike
        self.register_buffer("stretch", torch.ones_like(start.scale))
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale)) if scales == "learned" else None

    def forward(self, latent: Tensor) -> Tensor:
        """Returns the (C, K) rounded weight of a (C, K) latent."""
        rounded: Tensor = _RoundThrough.apply(latent, self.log_scale, self)  # type: ignore[no-untyped-call]  # torch's
        return rounded

    def search(self, latent: Tensor) -> None:
        """Does nothing: there is no clip to search."""

    @torch.no_grad()
    def quantized(self, latent: Tensor) -> Quantized:
        """Returns the codes, the scale and the exponents of the weight that `forward` returns."""
        scale = self.current_scale()
        found = Rounded(self.codes(latent, scale), scale, torch.zeros_like(scale), (self.rows, self.columns))
        return as_stored(self.shape, self.spec, found, None)

    def as_weight(self, latent: Tensor) -> Tensor:
        """Returns a latent in the weight's own units and shape."""
        return (latent * (self.factors * self.unit)).reshape(self.shape)

    def current_scale(self) -> Tensor:
        """Returns the (1, 1) scale as it would be stored now."""
        scale = self.scale * self.stretch
        return storable_scale(scale if self.log_scale is None else scale * self.log_scale.detach().exp(), self.spec)

    def codes(self, latent: Tensor, scale: Tensor) -> Tensor:
        """Returns the (C, K) float32 codes of a latent with a (1, 1) scale."""
        found = nearest_codes(latent.reshape(1, 1, -1), scale / self.unit, torch.zeros_like(scale), self.spec)
        return found.reshape(latent.shape)

    def coded_bits(self, latent: Tensor) -> Tensor:
        """Returns an estimate of the bits that all codes take, a number; each row has its own mean magnitude.

        The gradient passes the rounding to the latent and to a learned scale.
        """
        exact = latent * (self.unit / self.current_scale())
        if self.log_scale is not None:
            exact = exact * (self.log_scale.detach() - self.log_scale).exp()
        codes = exact + (exact.round() - exact).detach()
        mean = codes.abs().mean(dim=1).clamp(min=LEAST_MEAN)  # (C,)
        return codes.shape[1] * (mean.asinh() + mean * mean.reciprocal().asinh()).sum() / math.log(2)


class _RoundThrough(torch.autograd.Function):
    """The rounding of a latent, and the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, log_scale: Tensor | None, quantizer: UnclippedThrough) -> Tensor:
        scale = quantizer.current_scale()
        weight = quantizer.codes(latent, scale).mul_(quantizer.factors * scale)
        ctx.save_for_backward(quantizer.factors * quantizer.unit, *(() if log_scale is None else (latent, weight)))
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        units, *both = ctx.saved_tensors
        to_scale = None
        if both:
            latent, weight = both
            to_scale = torch.addcmul(weight, latent, units, value=-1).mul_(gradient).sum().reshape(1, 1)
        return gradient * units, to_scale, None


def unclipped_latent(weight: Tensor, start: Quantized, unit: Tensor, keep_codes: bool) -> Tensor:
    """Returns the (C, K) latent in units: the weight, moved into the interval of its code if codes are kept."""
    latent = _matrix(weight.detach().to(torch.float32)) / (_factors(*_exponents(start)) * unit)
    if keep_codes:
        codes = _matrix(start.codes).to(torch.float32)
        latent = torch.minimum(torch.maximum(latent, codes - 0.5 + MARGIN), codes + 0.5 - MARGIN)
    return latent


def _exponents(start: Quantized) -> tuple[Tensor, Tensor]:
    """Returns the exponents of rows (C,) and of columns (K,), int8; zeros where all steps are the same."""
    if start.exponents is not None:
        return start.exponents
    codes = _matrix(start.codes)
    rows, columns = (torch.zeros(count, dtype=torch.int8, device=codes.device) for count in codes.shape)
    return rows, columns


def _factors(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns (C, K) steps in units of the scale; (1, K) where all rows are alike, which takes less time."""
    return step_factors((rows if rows.any() else rows[:1], columns))


def _matrix(tensor: Tensor) -> Tensor:
    """Returns a weight, or its codes, as (C, K); a vector is a row."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
