"""Weights that are rounded in every forward pass of a training, so that the training makes up for the rounding.

What is trained is a *latent* weight; the model sees its rounding (Li et al. 2023, section 6: quantization-aware
training with the straight-through estimator, Bengio et al. 2013). The gradient passes the rounding as if it were the
identity inside the clipping range, and is 0 outside. What the model sees is `dequantize` of the codes that `quantized`
gives, bit for bit, so the weights that were trained are the weights in the packed file.

A latent is counted in *units* of the step of its grid at the start, one unit for each group: the same learning rate
then means the same number of rounding steps in every layer, whatever its bit-width. It starts inside the interval of
the code that the start's rounding chose (GPTQ's codes are not the nearest), at the point next to the trained weight.

Scales are frozen, or recomputed from the latents in each pass with the clip ratio of the last search (Rybakov et al.
2023), or learned (LSQ, Esser et al. 2020): scale = start * exp(log_scale), a parameter for each group, whose gradient
is that of LSQ, sum of (code - zero point - [inside] * weight / scale), times the scale. Zero points are not learned.

The scheme mulaw is trained by the General Quantizer instead (`mpq.quantization.soft_assignment`): from soft to hard.

Legend: C rows (output channels), K columns, G groups of `size` columns a row, as in `mpq.quantization.grids`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpq.artifact.weights import WeightFormat, quantize_weight
from mpq.errors import MpqError
from mpq.quantization.grids import (
    choose_clip,
    clipped_grid,
    is_sign,
    matrix_shape,
    nearest_codes,
    scale_shape,
    split_groups,
    storable_scale,
)
from mpq.quantization.quantizers import Quantized, dequantize
from mpq.quantization.soft_assignment import SoftToHard
from mpq.quantization.spec import FLOAT_BITS, QuantSpec

Scales = Literal["learned", "recomputed", "frozen"]

MARGIN = 0.1
"""Of a rounding step: how far from the border of its code's interval a latent starts at least."""


class StraightThrough(nn.Module):
    """The quantizer of one weight at one bit-width: latent -> the weight that the model sees.

    Args:
        spec: The quantizer.
        unit: (C, G): what a latent of 1 stands for.
        start: The grid to start from.
        scales: "learned", "recomputed" or "frozen".
    """

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
        return _RoundThrough.apply(latent, self.log_scale, self)

    @torch.no_grad()
    def search(self, latent: Tensor) -> None:
        """Searches the clip ratio for the latent as it is, where scales are recomputed."""
        if self.scales == "recomputed":
            for groups, part in _groups(self._exact(latent), self.spec):
                self.clip_ratio[:, part] = choose_clip(groups, self.spec)
            self._recompute(latent)

    @torch.no_grad()
    def quantized(self, latent: Tensor) -> Quantized:
        """Returns the codes, scales and zero points of what `forward` returns."""
        if self.scales == "recomputed":
            self._recompute(latent)
        scale = self.current_scale()
        codes = torch.empty_like(latent)
        for (groups, part), (into, _) in zip(_groups(latent, self.spec), _groups(codes, self.spec), strict=True):
            into.copy_(self._codes(groups, scale[:, part], part))
        symmetric = self.spec.scheme == "symmetric"
        return Quantized(
            codes=codes.to(torch.int8 if symmetric else torch.uint8).reshape(self.shape),
            scale=scale,
            zero_point=None if symmetric else self.zero_point.to(torch.uint8),
        )

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


class Annealed(nn.Module):
    """The General Quantizer (Zhen et al. 2022) of one weight at one bit-width, with the interface of `StraightThrough`.

    Weights are normalised by max|w|, as in the paper, times a clip ratio where the spec asks for a search.

    Args:
        spec: The quantizer, of the scheme "mulaw".
        unit: (1, 1): what a latent of 1 stands for.
        shape: Of the weight.
    """

    log_scale = None

    def __init__(self, spec: QuantSpec, unit: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.shape = SoftToHard(spec, groups=scale_shape(shape, spec)), shape
        self.register_buffer("unit", unit.clone())

    def forward(self, latent: Tensor) -> Tensor:
        """Returns the weight, on its way to the centroids, of a (C, K) latent."""
        return self.kernel(self.as_weight(latent))

    @torch.no_grad()
    def search(self, latent: Tensor) -> None:
        """Chooses mu and the clip ratios for the latent as it is, of a rounded weight as `quantizers.quantize` does."""
        weight = self.as_weight(latent)
        if self.kernel.is_hard:
            self.kernel.clip_ratio.fill_(1.0)
            self.kernel.choose_mu(weight)
            self.kernel.choose_clip(weight)
        self.kernel.choose_mu(weight)
        self.kernel.choose_clip(weight)

    @torch.no_grad()
    def quantized(self, latent: Tensor) -> Quantized:
        """Returns codes, scales and centroids of the rounded weight."""
        return self.kernel.quantized(self.as_weight(latent))

    def as_weight(self, latent: Tensor) -> Tensor:
        """Returns a latent in the weight's own units and shape."""
        return (latent * self.unit).reshape(self.shape)


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
        reach = scale * ((1.0 if is_sign(ctx.spec) else 0.5) * (1 + 1e-5))
        for found in zip(*(_groups(one, ctx.spec) for one in (latent, weight, gradient, to_latent)), strict=True):
            (x, part), (rounded, _), (g, _), (into, _) = found
            units = unit[:, part, None]
            error = torch.addcmul(rounded, x, units, value=-1)  # of the rounding
            inside = error.abs() <= reach[:, part, None]
            if to_scale is not None:
                # sign(w) * scale: which sign does not depend on the scale
                slope = rounded if is_sign(ctx.spec) else torch.where(inside, error, rounded)
                to_scale[:, part] = (slope * g).sum(dim=-1)
            torch.mul(g, inside, out=into).mul_(units)
        return to_latent, to_scale, None


def _groups(matrix: Tensor, spec: QuantSpec) -> Iterator[tuple[Tensor, slice]]:
    """Yields views (C, G', size) of a (C, K) matrix, and which groups they are."""
    start = 0
    for part in split_groups(matrix, spec):
        yield part, slice(start, start + part.shape[1])
        start += part.shape[1]


class QuantizedWeights(nn.Module):
    """All quantizable weights of a model, at the bit-widths of one allocation or of several that share the latents.

    Args:
        weights: {name: trained weight}, of every weight of the model.
        allocations: {name: bits} each; 16 and 32 leave a weight as it is. The first one's grids give the units.
        weight_format: How the weights are stored.
        grams: For the rounding "gptq" at the start, as in `mpq.artifact.weights.quantize_layer`.
        scales: As in `StraightThrough`.

    Raises:
        MpqError: A weight cannot be quantized; the message names it.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        allocations: Sequence[Mapping[str, int]],
        weight_format: WeightFormat,
        grams: Mapping[str, Tensor],
        scales: Scales,
    ) -> None:
        super().__init__()
        self.names, self.allocations, self.weight_format = tuple(weights), tuple(map(dict, allocations)), weight_format
        self.latents = nn.ParameterList()
        self.quantizers = nn.ModuleDict()
        nearest = replace(weight_format, spec=replace(weight_format.spec, rounding="nearest"))
        for index, (name, weight) in enumerate(weights.items()):
            widths = list(dict.fromkeys(bits[name] for bits in allocations if bits[name] not in FLOAT_BITS))
            specs = [replace(weight_format.spec, bits=bits) for bits in widths]
            # GPTQ's codes are those of one grid: not where several widths share a latent, nor where grids move at once
            keep_codes = len({bits[name] for bits in allocations}) == 1 and scales != "recomputed"
            starts = (
                quantize_weight(name, weight, weight_format if keep_codes else nearest, widths, grams) if widths else []
            )
            latent = weight.detach().float().clone()
            if starts and weight_format.spec.scheme == "mulaw":
                unit = torch.exp2(torch.log2(_mean_step(starts[0], specs[0])).round())
                latent = latent.reshape(matrix_shape(tuple(weight.shape), specs[0])) / unit
                for spec in specs:
                    self.quantizers[f"{index}:{spec.bits}"] = Annealed(spec, unit, tuple(weight.shape))
            elif starts:
                unit = starts[0].scale.clamp(min=torch.finfo(torch.float32).tiny)
                if not keep_codes:
                    unit = torch.exp2(torch.log2(unit).round())  # so that the latent is the weight exactly
                latent = _start(weight, specs[0], starts[0], unit, keep_codes)
                for spec, start in zip(specs, starts, strict=True):
                    self.quantizers[f"{index}:{spec.bits}"] = StraightThrough(spec, unit, start, scales)
            self.latents.append(nn.Parameter(latent))
        if weight_format.spec.scheme != "mulaw":  # whose search depends on alpha
            self.search()

    def forward(self, allocation: int = 0) -> dict[str, Tensor]:
        """Returns {name: weight as the model sees it} at the widths of an allocation.

        Raises:
            MpqError: A weight or scale went astray; the message names the weight.
        """
        return {name: self._seen(index, bits) for index, (name, bits) in enumerate(self._widths(allocation))}

    def quantized(self, allocation: int = 0) -> dict[str, Quantized]:
        """Returns {name: what is stored} of all weights that the allocation quantizes.

        Raises:
            MpqError: As `forward`.
        """
        found = {}
        for index, (name, bits) in enumerate(self._widths(allocation)):
            if bits not in FLOAT_BITS:
                with _named(name):
                    found[name] = self.quantizers[f"{index}:{bits}"].quantized(self.latents[index])
        return found

    def rounded(self, allocation: int = 0) -> dict[str, Tensor]:
        """Returns {name: weight as the packed file gives it back} at the widths of an allocation."""
        stored = self.quantized(allocation)
        return {
            name: dequantize(stored[name], self.weight_format.spec)
            if name in stored
            else self._seen(index, bits).detach()
            for index, (name, bits) in enumerate(self._widths(allocation))
        }

    def anneal(self, alpha: float, is_hard: bool) -> None:
        """Sets how hard the assignment of the General Quantizer is."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer, Annealed):
                quantizer.kernel.alpha, quantizer.kernel.is_hard = alpha, is_hard

    def search(self) -> None:
        """Searches anew: the clip ratios where scales are recomputed, those and mu of the General Quantizer."""
        for key, quantizer in self.quantizers.items():
            quantizer.search(self.latents[int(key.split(":")[0])])

    def floats(self) -> dict[str, Tensor]:
        """Returns {name: the latent as a weight}: what the codes are rounded from."""
        found = {}
        for index, name in enumerate(self.names):
            latent, quantizer = self.latents[index].detach(), self._quantizer(index)
            found[name] = latent if quantizer is None else quantizer.as_weight(latent)
        return found

    def parameter_groups(self, scale_share: float, float_share: float) -> list[dict[str, Any]]:
        """Returns an optimizer's groups, with their "share" of its rate: latents, log-scales, unquantized weights."""
        quantized = {int(key.split(":")[0]) for key in self.quantizers}
        log_scales = [one.log_scale for one in self.quantizers.values() if one.log_scale is not None]
        groups = [
            {"params": [self.latents[index] for index in sorted(quantized)], "share": 1.0},
            {"params": log_scales, "share": scale_share},
            {"params": [one for index, one in enumerate(self.latents) if index not in quantized], "share": float_share},
        ]
        return [group for group in groups if group["params"]]

    def _widths(self, allocation: int) -> Iterator[tuple[str, int]]:
        return ((name, self.allocations[allocation][name]) for name in self.names)

    def _quantizer(self, index: int) -> "StraightThrough | Annealed | None":
        """Returns one of the quantizers of a weight, which all have one unit; None if no allocation quantizes it."""
        return next((one for key, one in self.quantizers.items() if key.startswith(f"{index}:")), None)

    def _seen(self, index: int, bits: int) -> Tensor:
        latent = self.latents[index]
        if bits in FLOAT_BITS:
            quantizer = self._quantizer(index)  # of another allocation, which counts the latent in its units
            weight = latent if quantizer is None else quantizer.as_weight(latent)
            stored = weight.detach().to(getattr(torch, f"float{bits}")).to(torch.float32)
            return weight + (stored - weight.detach())  # as it will be stored, and the gradient straight through
        quantizer = self.quantizers[f"{index}:{bits}"]
        with _named(self.names[index]):
            return quantizer(latent).reshape(quantizer.shape)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says in an error which weight it is about."""
    try:
        yield
    except MpqError as error:
        raise MpqError(f"{name}: {error}") from None


def _mean_step(start: Quantized, spec: QuantSpec) -> Tensor:
    """Returns the (1, 1) mean distance of neighbouring levels."""
    tiny = torch.finfo(torch.float32).tiny
    return (start.scale.mean() * 2 / (2**spec.bits - 1)).clamp(min=tiny).reshape(1, 1)


def _start(weight: Tensor, spec: QuantSpec, start: Quantized, unit: Tensor, keep_codes: bool) -> Tensor:
    """Returns the (C, K) latent in units: the weight, moved into the interval of its code where it has to keep it."""
    rows, columns = matrix_shape(tuple(weight.shape), spec)
    levels = start.codes.reshape(rows, columns).to(torch.float32)
    latent = weight.detach().to(torch.float32).reshape(rows, columns).clone()
    for (groups, part), (level, _) in zip(_groups(latent, spec), _groups(levels, spec), strict=True):
        if start.zero_point is not None:
            level.sub_(start.zero_point[:, part, None])
        groups.div_(unit[:, part, None])
        if not keep_codes:
            continue
        if is_sign(spec):
            groups.copy_(torch.where(level > 0, groups.clamp(min=MARGIN), groups.clamp(max=-MARGIN)))
        else:
            groups.copy_(torch.minimum(torch.maximum(groups, level - 0.5 + MARGIN), level + 0.5 - MARGIN))
    return latent
