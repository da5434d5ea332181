"""Weights that are rounded in every forward pass of a training, so that the training makes up for the rounding.

The training changes *latent* weights; the model sees their rounding, bit for bit what the packed file will give back.
Schemes of evenly spaced levels are trained with the straight-through estimator (`mpq.finetuning.straight_through`),
schemes of centroids by the General Quantizer (`mpq.quantization.soft_assignment`), from soft to hard. The record of a
scheme in `mpq.quantization.spec` says which of these trains it. Where codes are entropy-coded, the straight-through
estimator has no range to clip (`mpq.finetuning.unclipped`), and each allocation has its own steps.

Legend: C rows (output channels), K columns, as in `mpq.quantization.grids`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.artifact.weights import WeightFormat, quantize_weight
from mpq.errors import MpqError
from mpq.finetuning.straight_through import StraightThrough, start_latent
from mpq.finetuning.unclipped import UnclippedThrough, unclipped_latent
from mpq.quantization.grids import matrix_shape, scale_shape
from mpq.quantization.quantizers import Quantized, dequantize
from mpq.quantization.soft_assignment import SoftToHard
from mpq.quantization.spec import FLOAT_BITS, QuantSpec, Scales

OPTIONS = {"straight_through": ("scales",), "soft_assignment": ("alpha", "anneal")}
"""The keys of a recipe's [finetune] that one way of training reads and the other does not."""


def check_scales(spec: QuantSpec, scales: Scales) -> None:
    """Raises MpqError unless weights of the spec's scheme can be trained, with such scales."""
    scheme, record = spec.scheme, spec.record
    if record.training is None:
        raise MpqError(f"scheme {scheme}: its weights cannot be trained; allocate with another --scheme")
    if record.training == "straight_through" and scales not in record.scales:
        raise MpqError(f"finetune.scales: expected {' or '.join(record.scales)} for the scheme {scheme}, got {scales}")


class Annealed(nn.Module):
    """The General Quantizer (Zhen et al. 2022) of one weight at one bit-width, with the interface of `StraightThrough`.

    Weights are normalised by max|w|, as in the paper, times a clip ratio where the spec asks for a search.

    Args:
        spec: The quantizer, of a scheme with centroids.
        unit: (1, 1): what a latent of 1 stands for.
        shape: The weight's shape.
    """

    unit: Tensor
    log_scale = None

    def __init__(self, spec: QuantSpec, unit: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.shape = SoftToHard(spec, groups=scale_shape(shape, spec)), shape
        self.register_buffer("unit", unit.clone())

    def forward(self, latent: Tensor) -> Tensor:
        """Returns the weight, on its way to the centroids, of a (C, K) latent."""
        seen: Tensor = self.kernel(self.as_weight(latent))
        return seen

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


Quantizer = StraightThrough | UnclippedThrough | Annealed
"""The quantizer of one weight."""


class QuantizedWeights(nn.Module):
    """All quantizable weights of a model, at the bit-widths of one allocation or of several that share the latents.

    Args:
        weights: {name: trained weight}, of every weight of the model.
        allocations: {name: bits} each; 16 and 32 leave a weight as it is. The first one's grids give the units.
        weight_format: The format in which the weights are stored.
        grams: Statistics for the rounding at the start, as in `mpq.artifact.weights.quantize_layer`.
        scales: "learned", "recomputed" or "frozen" (`mpq.finetuning.straight_through`).

    Raises:
        MpqError: The scheme cannot be trained with such scales, or a weight, which is named, cannot be quantized.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        allocations: Sequence[Mapping[str, float]],
        weight_format: WeightFormat,
        grams: Mapping[str, Tensor],
        scales: Scales,
    ) -> None:
        super().__init__()
        self.names, self.allocations, self.weight_format = tuple(weights), tuple(map(dict, allocations)), weight_format
        self.latents = nn.ParameterList()
        self.quantizers = nn.ModuleDict()
        check_scales(weight_format.spec, scales)
        for index, (name, weight) in enumerate(weights.items()):
            self.latents.append(nn.Parameter(self._added(index, name, weight, grams, scales)))
        if not self.is_annealed:  # whose search depends on alpha
            self.search()

    def _added(self, index: int, name: str, weight: Tensor, grams: Mapping[str, Tensor], scales: Scales) -> Tensor:
        """Makes the quantizers of one weight, and returns its latent."""
        all_bits = [bits[name] for bits in self.allocations]
        widths = [bits for bits in dict.fromkeys(all_bits) if bits not in FLOAT_BITS]
        if not widths:
            return weight.detach().float().clone()
        weight_format = self.weight_format
        if weight_format.spec.record.is_entropy_coded:
            return self._added_unclipped(index, name, weight, grams, scales)
        # GPTQ's codes are those of one grid, so not where several widths share a latent or grids move at once
        keep_codes = len(set(all_bits)) == 1 and scales != "recomputed"
        if not keep_codes:
            nearest = weight_format.spec.record.roundings[0]
            weight_format = replace(weight_format, spec=replace(weight_format.spec, rounding=nearest))
        starts = quantize_weight(name, weight, weight_format, widths, grams)
        specs = [replace(self.weight_format.spec, bits=bits) for bits in widths]
        if self.is_annealed:
            unit = torch.exp2(torch.log2(_mean_step(starts[0], specs[0])).round())
            for spec in specs:
                self.quantizers[f"{index}:{spec.bits}"] = Annealed(spec, unit, tuple(weight.shape))
            return weight.detach().float().reshape(matrix_shape(tuple(weight.shape), specs[0])) / unit
        unit = starts[0].scale.clamp(min=torch.finfo(torch.float32).tiny)
        if not keep_codes:
            unit = torch.exp2(torch.log2(unit).round())  # so that the latent is the weight exactly
        for spec, start in zip(specs, starts, strict=True):
            self.quantizers[f"{index}:{spec.bits}"] = StraightThrough(spec, unit, start, scales)
        return start_latent(weight, specs[0], starts[0], unit, keep_codes)

    def _added_unclipped(
        self, index: int, name: str, weight: Tensor, grams: Mapping[str, Tensor], scales: Scales
    ) -> Tensor:
        """Makes the quantizers of a weight that is entropy-coded, one for each allocation; returns its latent."""
        all_bits = [bits[name] for bits in self.allocations]
        widths = [bits for bits in dict.fromkeys(all_bits) if bits not in FLOAT_BITS]
        starts = dict(zip(widths, quantize_weight(name, weight, self.weight_format, widths, grams), strict=True))
        first = starts[widths[0]]
        for allocation, bits in enumerate(all_bits):
            if bits not in FLOAT_BITS:
                spec = replace(self.weight_format.spec, bits=bits)
                quantizer = UnclippedThrough(spec, first.scale, starts[bits], scales)
                self.quantizers[self._key(index, allocation)] = quantizer
        return unclipped_latent(weight, first, first.scale, keep_codes=len(set(all_bits)) == 1)

    @property
    def is_annealed(self) -> bool:
        """Whether the weights move from soft to hard (the General Quantizer)."""
        return self.weight_format.spec.record.training == "soft_assignment"

    def forward(self, allocation: int = 0) -> dict[str, Tensor]:
        """Returns {name: weight as the model sees it} at the widths of an allocation.

        Raises:
            MpqError: A weight or scale went astray; the message names the weight.
        """
        return {name: self._seen(index, allocation) for index, name in enumerate(self.names)}

    def quantized(self, allocation: int = 0) -> dict[str, Quantized]:
        """Returns {name: codes, scales and zero points} of all weights that the allocation quantizes.

        Raises:
            MpqError: A weight or scale went astray; the message names the weight.
        """
        found = {}
        for index, (name, bits) in enumerate(self._widths(allocation)):
            if bits not in FLOAT_BITS:
                with _named(name):
                    found[name] = self._at(index, allocation).quantized(self.latents[index])
        return found

    def rounded(self, allocation: int = 0) -> dict[str, Tensor]:
        """Returns {name: weight as the packed file gives it back} at the widths of an allocation."""
        stored = self.quantized(allocation)
        return {
            name: dequantize(stored[name], replace(self.weight_format.spec, bits=bits))
            if name in stored
            else self._seen(index, allocation).detach()
            for index, (name, bits) in enumerate(self._widths(allocation))
        }

    def coded_bits(self, allocation: int = 0) -> Tensor:
        """Returns an estimate, with a gradient, of the bits that the entropy-coded weights of an allocation take."""
        return torch.stack([quantizer.coded_bits(latent) for latent, quantizer in self._unclipped(allocation)]).sum()

    def coded_weights(self, allocation: int = 0) -> int:
        """Returns the number of weights that an allocation entropy-codes."""
        return sum(latent.numel() for latent, _ in self._unclipped(allocation))

    def stretch(self, allocation: int, factor: float) -> None:
        """Makes the steps of all entropy-coded weights of an allocation `factor` times as large as they would be."""
        for _, quantizer in self._unclipped(allocation):
            quantizer.stretch.fill_(factor)

    def stretched(self, allocation: int) -> float:
        """Returns the factor that `stretch` set, 1 at the start."""
        return next((float(quantizer.stretch) for _, quantizer in self._unclipped(allocation)), 1.0)

    def anneal(self, alpha: float, is_hard: bool) -> None:
        """Sets the sharpness of the General Quantizer's assignment, and whether it is hard."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer, Annealed):
                quantizer.kernel.alpha, quantizer.kernel.is_hard = alpha, is_hard

    def search(self) -> None:
        """Searches anew for clip ratios of recomputed scales, and for clip ratios and mu of the General Quantizer."""
        for index, quantizer in self._all():
            quantizer.search(self.latents[index])

    def floats(self) -> dict[str, Tensor]:
        """Returns {name: latent as a weight}, from which the codes are rounded."""
        found = {}
        for index, name in enumerate(self.names):
            latent, quantizer = self.latents[index].detach(), self._quantizer(index)
            found[name] = latent if quantizer is None else quantizer.as_weight(latent)
        return found

    def parameter_groups(self, scale_share: float, float_share: float) -> list[dict[str, Any]]:
        """Returns an optimizer's groups, with their "share" of its rate: latents, log-scales, unquantized weights."""
        quantized = {index for index, _ in self._all()}
        log_scales = [one.log_scale for _, one in self._all() if one.log_scale is not None]
        groups = [
            {"params": [self.latents[index] for index in sorted(quantized)], "share": 1.0},
            {"params": log_scales, "share": scale_share},
            {"params": [one for index, one in enumerate(self.latents) if index not in quantized], "share": float_share},
        ]
        return [group for group in groups if group["params"]]

    def _widths(self, allocation: int) -> Iterator[tuple[str, float]]:
        return ((name, self.allocations[allocation][name]) for name in self.names)

    def _all(self) -> Iterator[tuple[int, Quantizer]]:
        """Yields the index of a weight and one of its quantizers."""
        for key, quantizer in self.quantizers.items():
            assert isinstance(quantizer, Quantizer)
            yield int(key.split(":")[0]), quantizer

    def _unclipped(self, allocation: int) -> Iterator[tuple[Tensor, UnclippedThrough]]:
        """Yields the latents of all weights that the allocation entropy-codes, and their quantizers."""
        for index, (_, bits) in enumerate(self._widths(allocation)):
            if bits not in FLOAT_BITS and isinstance(quantizer := self._at(index, allocation), UnclippedThrough):
                yield self.latents[index], quantizer

    def _key(self, index: int, allocation: int) -> str:
        """Returns the name of a quantizer, which allocations share where widths are all that matters."""
        if self.weight_format.spec.record.is_entropy_coded:
            return f"{index}:{allocation}"
        return f"{index}:{self.allocations[allocation][self.names[index]]}"

    def _at(self, index: int, allocation: int) -> Quantizer:
        quantizer = self.quantizers[self._key(index, allocation)]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def _quantizer(self, index: int) -> Quantizer | None:
        """Returns one of the quantizers of a weight, which all have one unit; None if no allocation quantizes it."""
        widths = enumerate(one[self.names[index]] for one in self.allocations)
        return next((self._at(index, allocation) for allocation, bits in widths if bits not in FLOAT_BITS), None)

    def _seen(self, index: int, allocation: int) -> Tensor:
        latent, bits = self.latents[index], self.allocations[allocation][self.names[index]]
        if bits in FLOAT_BITS:
            other = self._quantizer(index)  # of another allocation, which counts the latent in its units
            weight = latent if other is None else other.as_weight(latent)
            stored = weight.detach().to(getattr(torch, f"float{bits}")).to(torch.float32)
            return weight + (stored - weight.detach())  # as it will be stored, and the gradient straight through
        quantizer = self._at(index, allocation)
        with _named(self.names[index]):
            seen: Tensor = quantizer(latent)
            return seen.reshape(quantizer.shape)


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
    step: Tensor = start.scale.mean() * 2 / (len(spec.codes) - 1)
    return step.clamp(min=tiny).reshape(1, 1)
