"""The importance of a feed-forward module's hidden units, and the model with its units in that order.

The candidates of an architecture search are nested (Li et al. 2023, section 3): one of width d has the first d units.
An untrained supernet learns to make those the useful ones; a trained model has its units in any order, so they are put
into the order of their importance first. That changes no output.

Unit k adds h_k w_k to the module's output, h_k its activation and w_k its column of the second matrix. Leaving a set R
of units out changes the output on the data by sum over k, l in R of Q_kl, Q = (sum of h h') * (W2' W2) elementwise. The
order is greedy: the next unit is the one without which that sum, over all units not yet chosen, would be least. So a
unit counts for what it adds to those before it, and two that cancel each other are kept or left together.
`mpq.quantization.gptq` uses the same Gram matrices.

Its worth: NVIDIA's 13 M Conformer, all 32 modules cut from 704 units, nothing trained after it, Gram matrices of
60 s of training audio; bounded divergence of the CTC output on 120 s of other audio, nats a frame. "Refit": the second
matrix solved anew for the units that are left, a stand-in for training.

    width                                    7/8    3/4    1/2     refit: 7/8    3/4    1/2
    random (mean of three)                   0.052  0.101  0.286          0.058  0.105  0.218
    norm of row x norm of column             0.062  0.107  0.302          0.072  0.123  0.209
    energy, Q_kk                             0.050  0.118  0.316          0.045  0.079  0.155
    the same of h less its mean              0.053  0.109  0.323          0.044  0.076  0.151
    Fisher, sum over frames of (h g)^2       0.055  0.107  0.278          0.059  0.103  0.182
    Fisher, utterances: (sum of h g)^2       0.049  0.114  0.263          0.050  0.097  0.181
    greedy by Q, this                        0.044  0.091  0.220          0.038  0.073  0.159
    greedy by Q, from the last unit to the first
                                             0.045  0.091  0.228          0.045  0.070  0.156
    greedy by Q of h less its mean           0.054  0.109  0.308          0.043  0.079  0.149
    greedy by Q, W2' W2 in the Fisher metric 0.050  0.094  0.261          0.048  0.082  0.157
    greedy by Q + Fisher, of equal traces    0.039  0.085  0.233          0.046  0.072  0.155
    Optimal Brain Surgeon                    0.042  0.106  0.279          0.037  0.071  0.152
    pivoted Cholesky of Q                    0.052  0.118  0.316          0.044  0.078  0.152

Scores of single units hardly beat chance before training: what counts is how their outputs go together. On 60 s of
other training audio and the whole development part (greedy 0.046, 0.094, 0.238; random 0.055, 0.108, 0.289) the sum
with the Fisher scores, which needs backward passes, is better at 7/8 alone (0.043, 0.099, 0.247). At a quarter of the
width nearly as much is lost in any order (0.37; random 0.36).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.conformer import FactoredLinear, FeedForward
from mpq.models.reshaping import feed_forwards, input_weight, matrix


@torch.no_grad()
def unit_importance(model: AsrModel, grams: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns for each block the (H,) float64 scores of its first and of its second module's H hidden units.

    A score is the number of units that are less important: H - 1 for the first one in the greedy order.

    Args:
        model: A float model.
        grams: `mpq.sensitivity.statistics.input_grams` of it, in which padding does not count.

    Raises:
        MpqError: Weights that are not finite, or statistics that are missing, misshapen or not finite; it names them.
    """
    scores = []
    for name, module in feed_forwards(model).items():
        weight, units = f"{name}.linear2.{input_weight(module.linear2)}", matrix(module.linear2)
        if weight not in grams:
            raise MpqError(f"{weight}: no statistics of its inputs; collect them from this model, with more audio")
        gram = grams[weight].to(units.device)
        if gram.shape != (1, units.shape[1], units.shape[1]):
            raise MpqError(f"{weight}: statistics of shape {tuple(gram.shape)} do not fit {units.shape[1]} inputs")
        effects = gram[0].double() * (units.double().T @ units.double())
        if not bool(effects.isfinite().all()):
            raise MpqError(f"{weight}: expected finite weights and statistics, got NaN or infinity")
        order = greedy_order(effects)
        rank = torch.empty(len(order), dtype=torch.float64)
        rank[order] = torch.arange(len(order) - 1, -1, -1, dtype=torch.float64)
        scores.append(rank)
    return list(zip(scores[0::2], scores[1::2], strict=True))


def greedy_order(effects: Tensor) -> Tensor:
    """Returns the H indices, most important first: each leaves the least sum of effects among those after it.

    Args:
        effects: (H, H), symmetric: leaving the set R out costs the sum of its elements over R x R.
    """
    left, own = effects.sum(dim=1), effects.diagonal()  # (H,) sums over the units that are not chosen yet
    chosen = torch.zeros_like(own, dtype=torch.bool)
    order = []
    for _ in range(len(own)):
        gain = (2 * left - own).masked_fill(chosen, -torch.inf)  # by which the sum over what is left falls
        best = int((gain == gain.max()).nonzero()[0])  # of equals the first
        order.append(best)
        chosen[best] = True
        left = left - effects[best]
    return torch.tensor(order)


@torch.no_grad()
def order_units(model: AsrModel, scores: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts the hidden units of every feed-forward module in order, in place, those of the highest scores first.

    Units of equal scores keep their order. The model's function stays the same.

    Args:
        model: A float model.
        scores: For each block (H,) of its first and of its second module.

    Raises:
        MpqError: Not one pair of scores for each block, not one score for each unit, or NaN among them; then nothing
            has been changed.
    """
    modules = feed_forwards(model)
    given = [one for pair in scores for one in pair]
    if len(given) != len(modules):
        raise MpqError(f"scores: expected those of {len(modules)} feed-forward modules, got {len(given)}")
    for (name, module), one in zip(modules.items(), given, strict=True):
        units = len(matrix(module.linear1))
        if one.shape != (units,):
            raise MpqError(f"{name}: scores: expected one for each of {units} units, got shape {tuple(one.shape)}")
        if bool(one.isnan().any()):
            raise MpqError(f"{name}: scores: got NaN for {int(one.isnan().sum())} of {units} units")
    for module, one in zip(modules.values(), given, strict=True):
        _permute(module, one.argsort(descending=True, stable=True))


def _permute(module: FeedForward, order: Tensor) -> None:
    """Makes unit order[k] the k-th."""
    rows = module.linear1.outer if isinstance(module.linear1, FactoredLinear) else module.linear1
    columns = module.linear2.inner if isinstance(module.linear2, FactoredLinear) else module.linear2
    order = order.to(rows.weight.device)
    rows.weight.copy_(rows.weight[order])
    if rows.bias is not None:
        rows.bias.copy_(rows.bias[order])
    columns.weight.copy_(columns.weight[:, order])
