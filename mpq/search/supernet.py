"""The supernet: all candidates of the feed-forward modules in one network of the largest sizes, by nesting.

Candidate i of a module has the first d_i of its hidden units: all share their weights (Li et al. 2023, section 3). As
the second matrix is linear, the sum over the candidates that Eq. 2 asks for,

    sum_i lambda_i W2[:, :d_i] act(W1[:d_i] x) = W2 (act(W1 x) * m),   m_k = sum of lambda_i over {i: d_i > k},

is one pass through the largest and one product, however many candidates there are. The same holds for the ranks of a
factored matrix A B: sum_i lambda_i A[:, :r_i] B[:r_i] x = A (B x * m). Both matrices of a module have one rank, so one
lambda, and each of them is a layer of Eq. 2 with its own sum. Where widths and ranks are searched together, each
has its own lambda.

A sampled path (one candidate a module) computes with slices of the matrices, and so costs what that candidate costs.

Legend: N utterances, T' frames, D encoder width, H hidden units, R rank, K candidates.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.allocation.knapsack import smallest_cost
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerOptions, FactoredLinear, FeedForward
from mpq.models.reshaping import FfnShapes, conformer, feed_forwards
from mpq.search.space import ModuleSpace, SearchSpace
from mpq.speech.augment import generator


def module_parameters(inputs: int, width: int, rank: int, use_bias: bool) -> int:
    """Returns the parameters of a feed-forward module, its LayerNorm aside.

    >>> module_parameters(256, 2048, 0, True), module_parameters(256, 2048, 160, True)
    (1050880, 739584)
    """
    matrices = 2 * rank * (inputs + width) if rank else 2 * inputs * width
    return matrices + (width + inputs if use_bias else 0)


def candidate_parameters(options: ConformerOptions, module: ModuleSpace) -> list[list[int]]:
    """Returns the parameters of each candidate of a module, by width and rank."""
    return [
        [module_parameters(options.width, width, rank, options.use_bias) for rank in module.ranks]
        for width in module.widths
    ]


def other_parameters(model: AsrModel) -> int:
    """Returns the parameters of all but the linear maps of the feed-forward modules, running statistics included."""
    options = conformer(model).options
    own = (shape for block in options.ffn_shapes() for shape in block)
    return model.parameter_counts()["total"] - sum(
        module_parameters(options.width, width, rank, options.use_bias) for width, rank in own
    )


def budget(model: AsrModel, space: SearchSpace, target_millions: float) -> int:
    """Returns the largest number of parameters of a model of a target size.

    Args:
        model: A model whose feed-forward modules may have any shapes.
        space: The candidates.
        target_millions: The parameters of the whole model, millions.

    Raises:
        MpqError: The smallest candidates make up more.
    """
    options, most = conformer(model).options, math.floor(round(target_millions * 1e6, 3))
    smallest = other_parameters(model) + sum(
        min(map(min, candidate_parameters(options, module))) for block in space for module in block
    )
    if most < smallest:
        raise MpqError(
            f"[search] target_millions: expected {smallest / 1e6:.6f} or more, what the smallest candidates make up, "
            f"got {target_millions:.6f}"
        )
    return most


def nested_mask(candidates: Sequence[int], weights: Tensor) -> Tensor:
    """Returns the (d,) mask m_k = sum of the weights of the candidates above k, d being the largest candidate.

    Args:
        candidates: (K,) ascending sizes.
        weights: (K,) lambda.

    >>> nested_mask([1, 3], torch.tensor([0.25, 0.75]))
    tensor([1.0000, 0.7500, 0.7500])
    """
    above = weights.flip(0).cumsum(0).flip(0)  # (K,) sum of this weight and those of all larger candidates
    lengths = np.diff(candidates, prepend=0)
    return above.repeat_interleave(torch.tensor(lengths, device=weights.device), output_size=candidates[-1])


class NestedFeedForward(nn.Module):
    """A feed-forward module of the largest sizes that computes as one of its candidates, or as their weighted sum.

    Args:
        module: A module of the largest sizes; its matrices become this module's, under the same names.
    """

    def __init__(self, module: FeedForward) -> None:
        super().__init__()
        self.linear1, self.linear2, self.dropout = module.linear1, module.linear2, module.dropout
        self.train(module.training)
        self._width: int | None = None
        self._rank: int | None = None
        self._unit_mask: Tensor | None = None
        self._rank_mask: Tensor | None = None

    def be_whole(self) -> None:
        """Computes as the largest candidate."""
        self._width = self._rank = self._unit_mask = self._rank_mask = None

    def be_one(self, width: int, rank: int) -> None:
        """Computes as one candidate."""
        self.be_whole()
        self._width, self._rank = width, rank or None

    def be_sum(self, unit_mask: Tensor | None, rank_mask: Tensor | None) -> None:
        """Computes as the weighted sum of candidates.

        Args:
            unit_mask, rank_mask: (H,) and (R,) as `nested_mask` returns them; None: all ones.
        """
        self.be_whole()
        self._unit_mask, self._rank_mask = unit_mask, rank_mask

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self._linear(self.linear1, x, None, self._width))  # (N, T', H)
        hidden = F.dropout(hidden, self.dropout, self.training)
        if self._unit_mask is not None:
            hidden = hidden * self._unit_mask
        return self._linear(self.linear2, hidden, self._width, None)

    def _linear(self, linear: FactoredLinear | nn.Linear, x: Tensor, inputs: int | None, outputs: int | None) -> Tensor:
        """Returns the product of x and the first `inputs` columns and `outputs` rows of a matrix; None for all."""
        if not isinstance(linear, FactoredLinear):
            return F.linear(x, linear.weight[:outputs, :inputs], _first(linear.bias, outputs))
        x = F.linear(x, linear.inner.weight[: self._rank, :inputs])  # (N, T', R)
        if self._rank_mask is not None:
            x = x * self._rank_mask
        return F.linear(x, linear.outer.weight[:outputs, : self._rank], _first(linear.outer.bias, outputs))


def _first(bias: Tensor | None, count: int | None) -> Tensor | None:
    return None if bias is None else bias[:count]


def _relaxed_mask(
    candidates: Sequence[int], logits: Tensor, temperature: float, random: np.random.Generator | None
) -> Tensor | None:
    """Returns the mask of softmax((logits + G) / temperature), G Gumbel noise; None where there is no choice."""
    if len(candidates) == 1:
        return None
    noise = 0.0 if random is None else torch.from_numpy(random.gumbel(size=len(logits))).to(logits)
    return nested_mask(candidates, ((logits + noise) / temperature).softmax(dim=0))


class Supernet(nn.Module):
    """A model whose feed-forward modules are nested, and the logits of their candidates.

    Args:
        model: A model of the largest sizes; its feed-forward modules are replaced.
        space: The candidates.

    Raises:
        MpqError: The sizes of the model's modules are not the largest candidates.
    """

    def __init__(self, model: AsrModel, space: SearchSpace) -> None:
        super().__init__()
        self.model, self.space = model, [module for block in space for module in block]
        options = conformer(model).options
        own = [shape for block in options.ffn_shapes() for shape in block]
        if own != [module.largest for module in self.space]:
            raise MpqError(f"search: expected modules of the largest candidates, {self.space}, got {own}")
        self.nested = [NestedFeedForward(module) for module in feed_forwards(model).values()]
        for name, module in zip(feed_forwards(model), self.nested, strict=True):
            model.set_submodule(name, module)
        device = next(model.parameters()).device
        sizes = [(len(module.widths), len(module.ranks)) for module in self.space]
        self.width_logits = nn.ParameterList(nn.Parameter(torch.zeros(widths, device=device)) for widths, _ in sizes)
        self.rank_logits = nn.ParameterList(nn.Parameter(torch.zeros(ranks, device=device)) for _, ranks in sizes)
        self.counts = [candidate_parameters(options, module) for module in self.space]
        """Parameters of each module's candidates, by width and rank."""
        self._millions = [torch.tensor(table, device=device, dtype=torch.float32) / 1e6 for table in self.counts]
        self.rest = other_parameters(model)
        """Parameters of all else, BatchNorm's running means and variances included."""

    def arch_logits(self) -> list[nn.Parameter]:
        """Returns the logits of all choices; where there is one candidate, there is no choice."""
        return [one for one in (*self.width_logits, *self.rank_logits) if len(one) > 1]

    def be_whole(self) -> None:
        """Computes as the largest candidates."""
        for module in self.nested:
            module.be_whole()

    def be_one(self, shapes: FfnShapes) -> None:
        """Computes as one architecture."""
        for module, shape in zip(self.nested, (shape for block in shapes for shape in block), strict=True):
            module.be_one(*shape)

    def be_sampled(self, seed: int, step: int) -> None:
        """Computes as an architecture drawn uniformly, each module by itself (single path, Guo et al. 2020).

        Args:
            seed, step: The training's seed and the update's number: the same ones draw the same.
        """
        random = generator(seed, step, "", "path")
        for module, space in zip(self.nested, self.space, strict=True):
            module.be_one(int(random.choice(space.widths)), int(random.choice(space.ranks)))

    def be_sum(self, temperature: float, random: np.random.Generator | None) -> None:
        """Computes as the sum of all candidates with lambda = softmax((alpha + G) / temperature).

        That is Eq. 3 of Li et al. 2023 as Maddison et al. 2017 have it (its print has log(alpha + G), and no sign of
        what keeps alpha + G positive). G = -log(-log U).

        Args:
            temperature: T.
            random: Draws U; None: no noise.
        """
        for module, space, widths, ranks in zip(
            self.nested, self.space, self.width_logits, self.rank_logits, strict=True
        ):
            unit_mask = _relaxed_mask(space.widths, widths, temperature, random)
            module.be_sum(unit_mask, _relaxed_mask(space.ranks, ranks, temperature, random))

    def expected_millions(self) -> Tensor:
        """Returns () the expected parameters of the searched modules, millions: C of Eq. 4, under softmax(alpha).

        As the temperature of Eq. 3 goes to 0, candidate i is drawn with the probability softmax(alpha)_i, so this is
        the mean of the penalty over the noise.
        """
        pairs = zip(self.width_logits, self.rank_logits, self._millions, strict=True)
        return torch.stack([a.softmax(0) @ counts @ b.softmax(0) for a, b, counts in pairs]).sum()

    @torch.no_grad()
    def probabilities(self) -> list[tuple[list[float], list[float]]]:
        """Returns softmax(alpha) of each module's widths and ranks."""
        logits = zip(self.width_logits, self.rank_logits, strict=True)
        return [(a.softmax(0).tolist(), b.softmax(0).tolist()) for a, b in logits]

    def best(self, most_parameters: int | None = None) -> FfnShapes:
        """Returns the most probable architecture, or the most probable one that is not above a size.

        The second is exact: -log softmax(alpha) adds up over the modules as the divergences of bit-widths do, so
        the dynamic programme of the allocation finds it (`mpq.allocation.knapsack`).

        Args:
            most_parameters: The largest number of parameters of the whole model, as `budget` returns it; None for any.

        Raises:
            MpqError: No architecture is as small as that.
        """
        options, tables = [], []
        for index, space in enumerate(self.space):
            costs = [
                -logits[index].detach().double().log_softmax(0) for logits in (self.width_logits, self.rank_logits)
            ]
            table = [(i, j) for i in range(len(space.widths)) for j in range(len(space.ranks))]
            options.append([(self.counts[index][i][j], float(costs[0][i] + costs[1][j])) for i, j in table])
            tables.append([(space.widths[i], space.ranks[j]) for i, j in table])
        if most_parameters is None:
            choices = [one.index(min(one, key=lambda pair: pair[::-1])) for one in options]
        else:
            choices = smallest_cost(options, most_parameters - self.rest)
        found = [table[choice] for table, choice in zip(tables, choices, strict=True)]
        return list(zip(found[::2], found[1::2], strict=True))
