"""Feed-forward matrices of a trained model in two factors each, W = A B (Li et al. 2023, section 2.1), by SVD.

A is (outputs, R), B is (R, inputs). The singular value decomposition gives the best W of rank R, and since its terms
are in order, the first R' of them are the best of rank R': the factors are nested, as the candidates of an architecture
search are. Each factor gets the square roots of the singular values, so that both are of one size.

Without data, the factors are those by which W itself changes least. With the Gram matrix H = L L' of the inputs, the
*output* on those data changes least: ||(W - A B) X||^2 = ||(W - A B) L||^2, so it is W L that is decomposed, and B
takes L back. That is far better. NVIDIA's 13 M Conformer, all 64 feed-forward matrices (704 x 176) factored and nothing
trained after it, Gram matrices of 60 s of training audio, bounded divergence of the CTC output on 120 s of other audio,
nats a frame:

    rank                          70     105    140 (as many weights as before)
    of the weights                0.320  0.254  0.254
    of the outputs, damping 1e-4  0.259  0.141  0.046
                    damping 0.01  0.257  0.134  0.046
                    damping 0.1   0.268  0.128  0.048

The damping is that of `mpq.quantization.gptq`, 0.01.

Legend: R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.conformer import FactoredLinear
from mpq.models.reshaping import FfnShapes, conformer, feed_forwards, input_weight, matrix, reshaped
from mpq.quantization.gptq import inverse_factor


@torch.no_grad()
def factored(model: AsrModel, ranks: Sequence[tuple[int, int]], grams: Mapping[str, Tensor] | None = None) -> AsrModel:
    """Returns the model with both matrices of each feed-forward module factored; everything else is copied.

    A module that is factored already is factored anew, from the product of its factors.

    Args:
        model: A float model.
        ranks: For each block the rank of its first and of its second module; 0 leaves a module as it is.
        grams: Gram matrices of the inputs (`mpq.sensitivity.statistics.input_grams`), for which the outputs change
            least; None: the weights change least.

    Raises:
        MpqError: Not one pair of ranks for each block, a rank below 0 or above the matrices' smaller side, a weight
            that is not finite, or a Gram matrix that is missing, misshapen, not finite or zero; it names the module.
    """
    before = conformer(model).options.ffn_shapes()
    if len(ranks) != len(before):
        raise MpqError(f"ranks: expected one pair for each of {len(before)} blocks, got {len(ranks)}")
    asked = [rank for pair in ranks for rank in pair]
    for (name, module), rank in zip(feed_forwards(model).items(), asked, strict=True):
        most = min(matrix(module.linear1).shape)
        if not 0 <= rank <= most:
            raise MpqError(f"{name}: rank: expected 0 (left as it is) or 1 to {most}, its smaller side, got {rank}")
    shapes: FfnShapes = [
        ((width, rank or own), (width2, rank2 or own2))
        for ((width, own), (width2, own2)), (rank, rank2) in zip(before, ranks, strict=True)
    ]
    new = reshaped(model, shapes)
    pairs = zip(feed_forwards(model).items(), feed_forwards(new).values(), asked, strict=True)
    for (name, source), target, rank in pairs:
        if not rank:
            target.load_state_dict(source.state_dict())
            continue
        for linear in ("linear1", "linear2"):
            old, factors = getattr(source, linear), getattr(target, linear)
            weight = f"{name}.{linear}.{input_weight(old)}"
            if grams is not None and weight not in grams:
                raise MpqError(f"{weight}: no statistics of its inputs; collect them from this model, with more audio")
            try:
                outer, inner = low_rank_factors(matrix(old), rank, None if grams is None else grams[weight])
            except MpqError as error:
                raise MpqError(f"{weight}: {error}") from None
            factors.outer.weight.copy_(outer)
            factors.inner.weight.copy_(inner)
            bias = old.outer.bias if isinstance(old, FactoredLinear) else old.bias
            if bias is not None:
                factors.outer.bias.copy_(bias)
    return new


def low_rank_factors(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns A (outputs, R) and B (R, inputs), float32, whose product is nearest to a weight, most important first.

    Args:
        weight: (outputs, inputs).
        rank: R, at most the smaller of the two.
        gram: (1, inputs, inputs) sum of the outer products of the inputs, damped as in `mpq.quantization.gptq`: the
            product is nearest in the outputs for these inputs. None: it is nearest in the weights.

    Raises:
        MpqError: The weight is not finite, or the Gram matrix is misshapen, not finite or zero.
    """
    w = weight.double()
    if not bool(w.isfinite().all()):
        raise MpqError("expected finite weights, got NaN or infinity")
    if gram is None:
        whitened = w
    else:
        if gram.shape != (1, w.shape[1], w.shape[1]):
            raise MpqError(f"statistics of shape {tuple(gram.shape)} do not fit a weight of {tuple(w.shape)}")
        u = inverse_factor(gram.to(w.device))[0].double()  # H = L L' with L the inverse of U, as H^-1 = U' U
        whitened = torch.linalg.solve_triangular(u, w, upper=True, left=False)
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    roots = values[:rank].sqrt()
    outer, inner = left[:, :rank] * roots, roots[:, None] * right[:rank]
    return outer.float(), (inner if gram is None else inner @ u).float()
