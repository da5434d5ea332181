"""How much the output will suffer from rounding errors, to second order, for all layers and widths at once.

Near the trained weights the divergence of the output distribution is half the squared rounding error in the metric of
the Fisher information: KL = 1/2 E[(d . gradient of log p(y))^2], y drawn from the model's own output (no transcripts).
So for each utterance a label is drawn for every frame, the sum of their log-probabilities is sent backward, and the
gradient of each layer's weight is multiplied with the rounding errors of that layer at every width. One backward pass
serves all layers and widths; the exact divergence (`mpq.sensitivity.measure_kl`) needs a forward pass for each.

What the score leaves out: third order, and whatever layers do to each other.

Legend: L layers, W widths, T' frames, V classes.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from scipy import stats
from torch import Tensor

from mpq.artifact import Storage, quantize_layer
from mpq.errors import MpqError
from mpq.models.base import AsrModel

DRAWS = 2
"""Labels drawn for each frame; the forward pass is shared, the backward pass is not."""


def fisher_scores(
    model: AsrModel,
    errors: Mapping[str, Sequence[Tensor]],
    features: Tensor,
    lengths: Tensor,
    seed: int = 0,
    output: str = "ctc",
) -> tuple[Tensor, int]:
    """Returns the (L, W) float64 scores of one utterance, nats summed over its frames, and its number of frames.

    Args:
        model: The float model.
        errors: {weight name: (numel,) rounding errors at each of the W widths} (`rounding_errors`).
        features, lengths: (1, T, F) and (1,) of the utterance.
        seed: Of the labels.
        output: "ctc": of the CTC posteriors; "encoder": of softmax of the encoder's output, and of the CTC posteriors
            for the weights that the encoder does not depend on.

    Raises:
        MpqError: A gradient is not finite; the message names the layer.
    """
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in errors]
    encoded, _ = model.encode(features, lengths)
    scores = torch.zeros(len(errors), len(next(iter(errors.values()))), dtype=torch.float64)
    log_probs = model.ctc_log_probs(encoded)[0]  # (T', V)
    generator = torch.Generator().manual_seed(_utterance_seed(seed, features))
    if output == "encoder":
        chains = [encoded[0].log_softmax(dim=-1), log_probs]
    else:
        chains = [log_probs]
    for _ in range(DRAWS):
        gradients: list[Tensor | None] = [None] * len(weights)
        for chain in chains:
            labels = torch.multinomial(chain.detach().exp().cpu(), 1, generator=generator).to(chain.device)
            total = chain.gather(1, labels).sum()
            found = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
            gradients = [old if old is not None else new for old, new in zip(gradients, found, strict=True)]
        for index, (name, gradient) in enumerate(zip(errors, gradients, strict=True)):
            if gradient is None:
                raise MpqError(f"{name}: takes no part in the output, so no score can be given")
            # one product at a time, so that each is the same whatever the other widths are
            products = torch.stack([error @ gradient.flatten() for error in errors[name]])  # (W,)
            scores[index] += 0.5 * products.double().square().cpu() / DRAWS
            if not bool(products.isfinite().all()):
                raise MpqError(f"{name}: expected a finite gradient, got NaN or infinity")
    return scores, len(log_probs)


def rounding_errors(
    model: AsrModel,
    storage: Storage,
    widths: Sequence[int],
    grams: Mapping[str, Tensor],
    on_layer: Callable[[float], None] = lambda amount: None,
) -> dict[str, list[Tensor]]:
    """Returns {weight name: quantized minus original weight, (numel,), at each width}: 4 bytes x W for each weight.

    Args:
        model: The float model.
        storage: The quantizer.
        widths: W bit-widths.
        grams: For the rounding "gptq": `mpq.calibration.input_grams`.
        on_layer: Told 1 with each finished layer.

    Raises:
        MpqError: A layer cannot be quantized; the message names it.
    """
    parameters = dict(model.named_parameters())
    errors = {}
    for ref in model.weights():
        weight = parameters[ref.name].detach()
        quantized = quantize_layer(ref.name, weight, storage, widths, grams)
        errors[ref.name] = [(one - weight).flatten() for one in quantized]
        on_layer(1)
    return errors


def mean_with_interval(sums: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the mean per frame of what was summed over utterances, and the ends of its 95 % confidence interval.

    The utterances are the sample; the mean is a ratio of sums, so its variance is that of (sum - mean x frames) over
    the utterances (Cochran 1977, section 6.4), with Student's t. One utterance gives no interval: (0, infinity).

    Args:
        sums: (U, ...) float64, each utterance's sum over its frames.
        frames: (U,) number of frames.
    """
    count = len(sums)
    frames = frames.to(torch.float64).reshape(-1, *[1] * (sums.ndim - 1))
    # cumsum adds in order; the order of sum depends on how many layers and widths there are
    mean = sums.cumsum(dim=0)[-1] / frames.sum()
    if count < 2:
        return mean, torch.zeros_like(mean), torch.full_like(mean, math.inf)
    residuals = sums - mean * frames
    error = (residuals.square().cumsum(dim=0)[-1] * count / (count - 1)).sqrt() / frames.sum()
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return mean, (mean - half).clamp(min=0), mean + half


def _utterance_seed(seed: int, features: Tensor) -> int:
    """Returns the seed of an utterance's labels: it depends on the utterance alone, not on its place in the data."""
    digest = hashlib.sha256(f"{seed}:".encode() + features.cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "little")
