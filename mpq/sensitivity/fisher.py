"""The expected effect of rounding errors on the output, to second order, for all layers and widths at once.

Near the trained weights the divergence of the output distribution is half the squared rounding error d in the metric of
the Fisher information: KL = 1/2 sum over frames and labels y of p(y) (d . gradient of log p(y))^2. The double sum is
the expectation of one square, (d . gradient of sum of sign x sqrt(p(y)) log p(y))^2, over random signs for each row
and label. So an utterance takes a backward pass for each set of signs (no transcripts), whose gradient of each weight
is multiplied with the rounding errors at every width. It serves all layers and widths; the exact divergence
(`mpq.sensitivity.measure.measure_kl`) needs a forward pass for each. Signs are used rather than labels drawn from p,
since a rare label with a large gradient makes the scores differ much from draw to draw.

Utterances differ by orders of magnitude in how far the expansion overshoots, so that one of them can hold most of the
sum over all. Such an utterance is lost at a low width whatever is done. So the score is each layer's *share* of an
utterance's total, averaged over utterances, times the geometric mean of the totals: the divergence of a typical
utterance. docs/rounding.md has the benefit, and what else was tried.

The third order, and the effects of layers on each other, are left out.

Legend: U utterances, L layers, W widths, T feature frames, F features, V classes. Rows are those of
`mpq.sensitivity.divergence`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from scipy import stats
from torch import Tensor

from mpq.artifact.sizes import LayerSizes
from mpq.artifact.weights import WeightFormat, quantize_weight
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.quantization.quantizers import dequantize
from mpq.sensitivity.divergence import SegmentTree

DRAWS = 2
"""Sets of signs for each utterance; the forward pass is shared, the backward pass is not."""


def fisher_scores(
    model: AsrModel,
    errors: Mapping[str, Sequence[Tensor]],
    features: Tensor,
    lengths: Tensor,
    seed: int = 0,
    output: str = "ctc",
) -> tuple[Tensor, int]:
    """Returns the (L, W) float64 scores of one utterance, nats summed over the rows of the output, and their number.

    Args:
        model: The float model.
        errors: {weight name: (numel,) rounding errors at each of the W widths} (`rounding_errors`).
        features, lengths: (1, T, F) and (1,) of the utterance, without padding.
        seed: The seed of the signs.
        output: The output whose divergence is estimated (`mpq.sensitivity.divergence`). Weights that it does not depend
            on are scored by an output that does, such as the CTC head by "ctc"; their score is the mean over that
            output's rows, times the number of rows of the chosen one.

    Raises:
        MpqError: An output that the model does not have, an output or a gradient that is not finite, or a weight that
            takes no part in the output; the message names the layer.
    """
    tree = SegmentTree(model)
    tree.check(output)
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in errors]
    outputs = (output, *(other for other in tree.recognition if other != output))
    context = model.output_context(features, lengths)
    states = tree.run({0: features}, tree.path(*outputs), context.inputs)
    log_probs = [tree.log_probs[one](states[tree.ends[one]][context.rows[one]]) for one in outputs]  # (rows, V) each
    scores = torch.zeros(len(errors), len(next(iter(errors.values()))), dtype=torch.float64)
    generator = torch.Generator().manual_seed(_utterance_seed(seed, features))
    if not all(bool(one.isfinite().all()) for one in log_probs):
        raise MpqError("the model's output is not finite; its activations overflow on this audio")
    for _ in range(DRAWS):
        found: dict[int, tuple[Tensor, float]] = {}  # {weight: gradient, rows of the chosen output for one of this}
        for one in log_probs:
            signs = torch.randint(0, 2, one.shape, generator=generator).to(one) * 2 - 1
            total = (one * (0.5 * one.detach()).exp() * signs).sum()
            left = [index for index in range(len(weights)) if index not in found]
            if not left:
                continue
            among = [weights[index] for index in left]
            gradients = torch.autograd.grad(total, among, retain_graph=True, allow_unused=True)
            for index, gradient in zip(left, gradients, strict=True):
                if gradient is not None:
                    found[index] = gradient, len(log_probs[0]) / len(one)
        for index, name in enumerate(errors):
            if index not in found:
                raise MpqError(f"{name}: takes no part in the output, so no score can be given")
            gradient, rows = found[index]
            # one product at a time, so that each is the same whatever the other widths are
            products = torch.stack([error @ gradient.flatten() for error in errors[name]])  # (W,)
            scores[index] += 0.5 * products.double().square().cpu() / DRAWS * rows
            if not bool(products.isfinite().all()):
                raise MpqError(f"{name}: expected a finite gradient, got NaN or infinity")
    return scores, len(log_probs[0])


def rounding_errors(
    model: AsrModel,
    weight_format: WeightFormat,
    widths: Sequence[float],
    grams: Mapping[str, Tensor],
    on_layer: Callable[[float], None] = lambda amount: None,
    sizes: LayerSizes | None = None,
) -> dict[str, list[Tensor]]:
    """Returns {weight name: quantized minus original weight, (numel,), at each width}: 4 bytes x W for each weight.

    Args:
        model: The float model.
        weight_format: The quantizer, and how weights are stored.
        widths: W bit-widths.
        grams: For the rounding "gptq": `mpq.sensitivity.statistics.input_grams`.
        on_layer: Called with 1 for each finished layer.
        sizes: Counts the bytes of the rounded layers, if given.

    Raises:
        MpqError: A layer cannot be quantized; the message names it.
    """
    parameters = dict(model.named_parameters())
    specs = [replace(weight_format.spec, bits=width) for width in widths]
    errors = {}
    for ref in model.weights():
        weight = parameters[ref.name].detach()
        stored = quantize_weight(ref.name, weight, weight_format, widths, grams)
        errors[ref.name] = [(dequantize(one, spec) - weight).flatten() for one, spec in zip(stored, specs, strict=True)]
        if sizes:
            sizes.add(ref.name, widths, stored)
        on_layer(1)
    return errors


def typical_scores(sums: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (L, W) nats per frame of a typical utterance, and the ends of their 95 % confidence intervals.

    A layer's score is its share of an utterance's total over the layers, averaged over the utterances, times the
    geometric mean of the totals per frame. The interval is Student's on the logarithm of the score, whose variance is
    that of share / (mean share) + log(total) over the utterances (the delta method). One utterance gives none: (0,
    infinity).

    Args:
        sums: (U, L, W) float64, each utterance's sum over its frames.
        frames: (U,) number of frames.
    """
    tiny = torch.finfo(torch.float64).tiny
    # cumsum adds in order, whatever the number of widths is; sum does not
    totals = sums.cumsum(dim=1)[:, -1:].clamp(min=tiny)  # (U, 1, W)
    count = len(sums)
    logs = (totals / frames.to(torch.float64)[:, None, None]).log()
    mean_log = logs.cumsum(dim=0)[-1] / count  # (1, W)
    shares = sums / totals
    mean = shares.cumsum(dim=0)[-1] / count
    score = mean * mean_log.exp()
    if count < 2:
        return score, torch.zeros_like(score), torch.full_like(score, math.inf)
    deviations = shares / mean.clamp(min=tiny) - 1 + logs - mean_log
    error = (deviations.square().cumsum(dim=0)[-1] / (count - 1) / count).sqrt()
    factor = (float(stats.t.ppf(0.975, count - 1)) * error).exp()
    return score, score / factor, score * factor


def _utterance_seed(seed: int, features: Tensor) -> int:
    """Returns the seed of an utterance's signs: it depends on the utterance alone, not on its place in the data."""
    digest = hashlib.sha256(f"{seed}:".encode() + features.cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "little")
