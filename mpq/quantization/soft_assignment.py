"""Weights that move to their levels in the course of a training: the General Quantizer (Zhen et al. 2022).

In the forward pass each weight is replaced by a mean of all centroids, each weighted by exp(-alpha * distance). While
alpha is small, that is a smooth function of the weight; alpha rises, and the function becomes the staircase of rounding
to nearest. Unlike with the straight-through estimator the gradient is exact all along, so weights are drawn away from
where two centroids meet. Nothing is added to the loss, and it happens in hooks of the training loop.

As printed (Eq. 1-3) this takes a matrix of weights x centroids. It does not need one: between two neighbouring
centroids all distances grow or shrink alike, so the sums over the centroids to the left and to the right are known but
for one factor each, and the mean is p + q * sigmoid(2 alpha (w - middle) + l), with p, q, l that depend on the
interval alone. Centroids are multiples of 1/128, so the interval is found by rounding w down, without a search.
`tests/bench_general_quantizer.py` measures the saving.

Legend: a weight of shape (C, ...) in rows and groups as in `mpq.quantization.grids`; m centroids as in
    `mpq.quantization.mu_law`.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from mpq.errors import MpqError
from mpq.quantization.grids import Rounded, choose_clip, clipped_grid, matrix_shape, nearest_codes, split_groups
from mpq.quantization.mu_law import MUS, UNIT, mu_law_centroids
from mpq.quantization.quantizers import Quantized, as_stored, dequantize
from mpq.quantization.spec import SCHEMES, QuantSpec

_AT_ONCE = 2**15 - 1
"""Weights that a processor works on at once: few enough for all temporary values to stay in its cache, and for torch
to use one thread: with more, each of the many small operations would wait for the slowest of them."""


def annealed_alpha(step: int, start_step: int, end_step: int, alpha_start: float, alpha_end: float) -> float:
    """Returns alpha at a step: linear from start_step to end_step (Zhen et al. 2022, Eq. 4), constant before and after.

    >>> [annealed_alpha(step, 10, 20, 10, 500) for step in (0, 10, 15, 20, 99)]
    [10.0, 10.0, 255.0, 500.0, 500.0]
    """
    if step < start_step:
        return float(alpha_start)
    if step >= end_step:
        return float(alpha_end)
    return alpha_start + (step - start_step) * (alpha_end - alpha_start) / (end_step - start_step)


def soft_assign(weights: Tensor, centroids: Tensor, alpha: float) -> Tensor:
    """Returns softmax(-alpha |w - z|) @ z for each weight w, z the centroids / 128 (Zhen et al. 2022, Eq. 2-3).

    The gradient to the weights is exact; to centroids and alpha there is none. Where a weight is a centroid the
    derivative is that to its right. Outside the outermost centroids the function is constant.

    >>> soft_assign(torch.tensor([-2.0, 0.1, 0.6]), torch.tensor([-128, 0, 64], dtype=torch.int8), 1000.0)
    tensor([-1.0000,  0.0000,  0.5000])

    Args:
        weights: float32 or float64 numbers of any shape, in units of the scale (most of them in [-1, 1]).
        centroids: (m,) int8, ascending, in units of 1/128; equal ones count as often as they are there.
        alpha: At least 0.

    Raises:
        MpqError: alpha is below 0 or not finite, or the centroids are not of that kind.
    """
    ones = weights.new_ones(1, 1)
    return _soft(weights.reshape(1, -1), ones, centroids, alpha).reshape(weights.shape)


def _soft(weights: Tensor, scale: Tensor, centroids: Tensor, alpha: float) -> Tensor:
    """Returns scale * soft_assign(weights / scale) of weights (R, S) with scales (R, 1)."""
    result: Tensor = _SoftAssign.apply(weights, scale, centroids, alpha)  # type: ignore[no-untyped-call]  # torch's
    return result


class _SoftAssign(torch.autograd.Function):
    """The function `_soft` and its gradient."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, scale: Tensor, centroids: Tensor, alpha: float) -> Tensor:
        columns = _interval_table(tuple(centroids.tolist()), float(alpha)).to(weights)
        inverse = scale.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        result = torch.empty_like(weights)
        slope = torch.empty_like(weights) if ctx.needs_input_grad[0] else result
        at_once = _AT_ONCE if weights.device.type == "cpu" else weights.numel() + 1
        dim, size = (0, max(at_once // weights.shape[1], 1)) if len(weights) > 1 else (1, at_once)
        pieces = [torch.split(tensor, size, dim) for tensor in (weights, result, slope)]
        factors = [torch.split(one, size) if dim == 0 else [one] * len(pieces[0]) for one in (scale, inverse)]
        for some, values, slopes, factor, divisor in zip(*pieces, *factors, strict=True):
            x = some * divisor
            # from -1 - 1/128 to 127/128 in steps of 1/128; NaN becomes some cell, and stays NaN below
            cell = x.mul(UNIT).add_(UNIT + 1).clamp_(0, 2 * UNIT).to(torch.int64).clamp_(min=0).flatten()
            p, q, middle, offset = (column.index_select(0, cell).view_as(x) for column in columns)
            share = offset.add_(x.sub_(middle), alpha=2 * alpha).sigmoid_()  # of the right-hand centroids
            torch.addcmul(p, q, share, out=values).mul_(factor)
            if slope is not result:
                torch.mul(share.addcmul_(share, share, value=-1).mul_(2 * alpha), q, out=slopes)
        ctx.save_for_backward(slope)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None, None


@lru_cache(maxsize=256)
def _interval_table(centroids: tuple[int, ...], alpha: float) -> Tensor:
    """Returns p, q, middle and l of each of 257 cells of width 1/128, the first of which begins at -129/128: (4, 257).

    The mean of the centroids left of a point, weighted by exp(-alpha * distance), is the same (p) wherever the point
    is, and so is that of the centroids to the right (p + q). The two weights' sums, taken at the nearest centroid of
    each side, are C and E; l = log(E / C), and at a distance they shrink by exp(-alpha * distance).
    """
    if not 0 <= alpha < math.inf:
        raise MpqError(f"alpha: expected a finite number of at least 0, got {alpha}")
    if not centroids or list(centroids) != sorted(centroids) or centroids[0] < -UNIT or centroids[-1] >= UNIT:
        raise MpqError(f"centroids: expected whole numbers from {-UNIT} to {UNIT - 1}, ascending, got {centroids[:9]}")
    left = _running_sums([k / UNIT for k in centroids], alpha)
    right = _running_sums([k / UNIT for k in reversed(centroids)], alpha)[::-1]
    rows = []
    for cell in range(-UNIT - 1, UNIT):
        above = bisect_right(centroids, cell)  # index of the first centroid right of the cell
        if above == 0:
            rows.append((right[0][0] / right[0][1], 0.0, 0.0, 0.0))
            continue
        a, c = left[above - 1]
        if above == len(centroids):
            rows.append((a / c, 0.0, 0.0, 0.0))
            continue
        b, e = right[above]
        middle = (centroids[above - 1] + centroids[above]) / (2 * UNIT)
        rows.append((a / c, b / e - a / c, middle, math.log(e / c)))
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


def _running_sums(points: list[float], alpha: float) -> list[tuple[float, float]]:
    """Returns, for each of points in order, the sums of z exp(-alpha d) and of exp(-alpha d) over it and those before.

    d is the distance to it.
    """
    sums, before = [], points[0]
    weighted = total = 0.0
    for point in points:
        shrunk = math.exp(-alpha * abs(point - before))
        weighted, total, before = point + weighted * shrunk, 1 + total * shrunk, point
        sums.append((weighted, total))
    return sums


class SoftToHard(nn.Module):
    """A weight on the way to its centroids, as the forward pass sees it.

    It works as a torch parametrization, or is called by itself:

        kernel = SoftToHard(QuantSpec(4, "mulaw", "channel", "none"))
        kernel.choose_mu(latent)
        output = F.linear(x, kernel(latent))  # `latent` gets the gradient
        kernel.is_hard = True
        kernel(latent)  # what the packed file gives back, bit for bit

    Attributes:
        spec: The quantizer, of the scheme "mulaw". Scales are those of the weight as it is at each forward pass (no
            gradient flows into them): max|w| times a clip ratio, which `choose_clip` searches. At 1 bit the scale is
            mean|w|.
        alpha: The hardness of the assignment (Zhen et al. 2022, Eq. 2), in units of 1 / scale.
        is_hard: Whether the weight is rounded: the value is that of `dequantize(quantized(weight))`, and the gradient
            passes unchanged (straight-through estimator).
        mu: The parameter of the mu-law. Set it by `choose_mu`.
        centroids: (2^bits,) int8 buffer, in units of 1/128.
        clip_ratio: (C, G) float32 buffer of a weight whose clip was searched, else (1, 1) of one.

    All but `spec` is part of the state dict: alpha, is_hard and mu as one tensor, its extra state.
    """

    centroids: Tensor
    clip_ratio: Tensor

    def __init__(self, spec: QuantSpec, alpha: float = 10.0, mu: float = 0.0, groups: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        if spec.record.training != "soft_assignment":
            known = [name for name, record in SCHEMES.items() if record.training == "soft_assignment"]
            raise MpqError(f"scheme: expected {' or '.join(known)} for a soft assignment, got {spec.scheme}")
        self.spec, self.alpha, self.mu, self.is_hard = spec, alpha, mu, False
        self.register_buffer("centroids", mu_law_centroids(int(spec.bits), mu))
        self.register_buffer("clip_ratio", torch.ones(groups))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight, of any shape, as the layer is to see it.

        Raises:
            MpqError: The weight is not finite, or a scale does not fit into the spec's scale_dtype.
        """
        if self.is_hard:
            return self._rounded(weight, self.centroids) + (weight - weight.detach())
        return self._soft(weight, self.centroids)

    def choose_mu(self, weight: Tensor) -> float:
        """Sets mu to the one of `MUS` with the smallest ||value - weight|| at the current alpha (section 3.2).

        Returns:
            mu.
        """
        weight = weight.detach()
        value = self._rounded if self.is_hard else self._soft
        candidates = [mu_law_centroids(int(self.spec.bits), mu).to(weight.device) for mu in MUS]
        if self.spec.bits > 1:  # one bit has only the poles
            errors = [float((value(weight, one) - weight).square().sum(dtype=torch.float64)) for one in candidates]
            best = errors.index(min(errors))
            self.mu = MUS[best]
            self.centroids.copy_(candidates[best])
        return self.mu

    def choose_clip(self, weight: Tensor) -> None:
        """Sets the clip ratios that the spec's clip asks for, for the current centroids."""
        found = [choose_clip(part, self.spec, self.centroids) for part in self._parts(weight.detach())]
        self.clip_ratio = torch.cat(found, dim=1)

    def quantized(self, weight: Tensor) -> Quantized:
        """Returns a weight as stored: rounded to the current centroids.

        Raises:
            MpqError: The weight is not finite, or a scale does not fit into the spec's scale_dtype.
        """
        return self._quantized(weight, self.centroids)

    def extra_repr(self) -> str:
        return f"{self.spec}, alpha={self.alpha:g}, mu={self.mu:g}, is_hard={self.is_hard}"

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.alpha, self.is_hard, self.mu], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.alpha, is_hard, self.mu = state.tolist()
        self.is_hard = bool(is_hard)

    def _parts(self, weight: Tensor) -> list[Tensor]:
        """Returns a weight as groups of one size, (C, G, size) each."""
        working = torch.promote_types(weight.dtype, torch.float32)
        return split_groups(weight.to(working).reshape(matrix_shape(tuple(weight.shape), self.spec)), self.spec)

    def _scales(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns the (C, G) scales of groups."""
        counts = [part.shape[1] for part in parts]
        rows = len(parts[0])
        ratios = torch.split(self.clip_ratio.expand(rows, sum(counts)), counts, dim=1)
        pairs = zip(parts, ratios, strict=True)
        return [clipped_grid(part.detach().to(torch.float32), self.spec, ratio)[0] for part, ratio in pairs]

    def _quantized(self, weight: Tensor, centroids: Tensor) -> Quantized:
        if not weight.isfinite().all():
            raise MpqError(f"weight of shape {tuple(weight.shape)}: expected finite values, got NaN or infinity")
        parts = self._parts(weight.detach().to(torch.float32))
        scales = self._scales(parts)
        codes = [
            nearest_codes(part, scale, torch.zeros_like(scale), self.spec, centroids).flatten(1)
            for part, scale in zip(parts, scales, strict=True)
        ]
        scale = torch.cat(scales, dim=1)
        shape = tuple(weight.shape)
        rounded = Rounded(torch.cat(codes, dim=1), scale, torch.zeros_like(scale))
        return as_stored(shape, self.spec, rounded, centroids.clone())

    def _rounded(self, weight: Tensor, centroids: Tensor) -> Tensor:
        return dequantize(self._quantized(weight, centroids), self.spec).to(weight.dtype)

    def _soft(self, weight: Tensor, centroids: Tensor) -> Tensor:
        parts = self._parts(weight)
        results = []
        for part, scale in zip(parts, self._scales(parts), strict=True):
            rows = part.reshape(-1, part.shape[-1])
            result = _soft(rows, scale.reshape(-1, 1).to(part.dtype), centroids, self.alpha)
            results.append(result.reshape(len(part), -1))
        whole = torch.cat(results, dim=1) if len(results) > 1 else results[0]
        return whole.reshape(weight.shape).to(weight.dtype)


class GeneralQuantizer:
    """The callback of Zhen et al. 2022, section 3.4: quantization-aware training of any model in any loop.

        general_quantizer = GeneralQuantizer(model, {"0.weight": 4}, start_step=100, end_step=900)
        general_quantizer.on_train_begin()
        optimizer = torch.optim.Adam(model.parameters())
        for step, (x, y) in enumerate(batches):
            general_quantizer.on_step_begin(step)
            loss = cross_entropy(model(x), y)
            ...
        general_quantizer.on_train_end()  # now the weights are on their centroids
        general_quantizer.quantized()["0.weight"].codes

    Between begin and end the weights are torch parametrizations: the optimizer sees the latent weights, which are the
    same `Parameter` objects as before, and the state dict has them as `0.parametrizations.weight.original`.

    Args:
        model: Any module.
        bits: {parameter name: 1 to 8} of the weights to quantize; the others stay as they are.
        granularity: The weights that share a scale, as in `mpq.quantization.spec.QuantSpec`.
        start_step, end_step: The steps between which alpha rises.
        alpha_start, alpha_end: The values of alpha before and after; the defaults are the paper's example.
        mu_every: The number of steps, up to end_step, after which mu is chosen anew; the paper does not give one.
        scale_dtype: Type of the stored scales, as in `QuantSpec`.

    Raises:
        MpqError: A name that is none of the model's parameters, bad bits, granularity or steps.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: Mapping[str, int],
        granularity: str = "channel",
        *,
        start_step: int,
        end_step: int,
        alpha_start: float = 10.0,
        alpha_end: float = 500.0,
        mu_every: int = 100,
        scale_dtype: str = "float16",
    ) -> None:
        parameters = dict(model.named_parameters())
        for name in bits:
            if name not in parameters:
                raise MpqError(
                    f"bits: the model has no parameter {name!r}; known: {', '.join(list(parameters)[:5])} ..."
                )
        places = [(id(one), name) for name, one in model.named_parameters(remove_duplicate=False)]
        for name in bits:
            if tied := [other for key, other in places if key == id(parameters[name]) and other != name]:
                raise MpqError(f"bits: {name} is also {tied[0]} (tied weights), which would not see its quantization")
        if not 0 <= start_step <= end_step:
            raise MpqError(f"start_step, end_step: expected 0 <= start <= end, got {start_step} and {end_step}")
        for key, alpha in (("alpha_start", alpha_start), ("alpha_end", alpha_end)):
            if not 0 <= alpha < math.inf:
                raise MpqError(f"{key}: expected a finite number of at least 0, got {alpha}")
        if alpha_start > alpha_end:
            raise MpqError(
                f"alpha_start, alpha_end: expected the first not above the last, got {alpha_start}, {alpha_end}"
            )
        if mu_every < 1:
            raise MpqError(f"mu_every: expected at least 1 step, got {mu_every}")
        self.model, self.mu_every = model, mu_every
        self.schedule = (start_step, end_step, alpha_start, alpha_end)
        self.kernels = {
            name: SoftToHard(QuantSpec(width, "mulaw", granularity, "none", scale_dtype=scale_dtype), alpha_start)
            for name, width in bits.items()
        }
        self._stored: dict[str, Quantized] | None = None

    def on_train_begin(self) -> None:
        """Attaches the quantizers to the weights."""
        for name, kernel in self.kernels.items():
            owner, weight = self._place(name)
            kernel.to(getattr(owner, weight).device)
            kernel.choose_mu(getattr(owner, weight))
            register_parametrization(owner, weight, kernel)

    def on_step_begin(self, step: int) -> None:
        """Sets alpha for a step, counted from 0, and now and then mu."""
        alpha = annealed_alpha(step, *self.schedule)
        for name, kernel in self.kernels.items():
            kernel.alpha = alpha
            if step and step % self.mu_every == 0 and step <= self.schedule[1]:
                kernel.choose_mu(self._latent(name))

    def on_train_end(self) -> None:
        """Rounds the weights, and leaves them in the model as plain parameters."""
        self._stored = self.quantized()
        for name, kernel in self.kernels.items():
            kernel.is_hard = True
            remove_parametrizations(*self._place(name), leave_parametrized=True)

    def quantized(self) -> dict[str, Quantized]:
        """Returns each weight as stored, as it is now; after the end, as it was then."""
        if self._stored is not None:
            return self._stored
        return {name: kernel.quantized(self._latent(name)) for name, kernel in self.kernels.items()}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Returns the module that owns a parameter, and the parameter's name in it."""
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _latent(self, name: str) -> Tensor:
        owner, leaf = self._place(name)
        if is_parametrized(owner, leaf):
            owner, leaf = owner.get_submodule(f"parametrizations.{leaf}"), "original"
        return owner.get_parameter(leaf)
