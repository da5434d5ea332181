"""The same model with other feed-forward modules: untrained ones, or the first units and ranks of those it has.

A module's shape is its width (hidden units) and its rank (of both of its matrices; 0: not factored), as in
`ConformerOptions.ffn_shapes`. Shapes are nested: a smaller one is the first units and the first ranks of a larger one,
as the candidates of Li et al. 2023, section 3, share their weights.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerEncoder, FactoredLinear, FeedForward

FfnShapes = Sequence[tuple[tuple[int, int], tuple[int, int]]]
"""(width, rank) of the first and of the second feed-forward module of each block."""


def conformer(model: AsrModel) -> ConformerEncoder:
    """Returns the encoder of a model that has a Conformer."""
    assert isinstance(model.encoder, ConformerEncoder), f"{model.architecture}: no Conformer encoder"
    return model.encoder


def feed_forwards(model: AsrModel) -> dict[str, FeedForward]:
    """Returns {name: module} of the encoder's feed-forward modules: each block's first, then its second."""
    return {
        f"encoder.layers.{index}.{name}": module
        for index, block in enumerate(conformer(model).blocks())
        for name, module in (("feed_forward1", block.feed_forward1), ("feed_forward2", block.feed_forward2))
    }


def matrix(linear: nn.Module) -> Tensor:
    """Returns the (outputs, inputs) matrix of a linear map; of a factored one the product of its factors."""
    if isinstance(linear, FactoredLinear):
        return linear.outer.weight @ linear.inner.weight
    assert isinstance(linear, nn.Linear)
    return linear.weight


def input_weight(linear: FactoredLinear | nn.Linear) -> str:
    """Returns the name, within a linear map, of the weight that its inputs meet first."""
    return "inner.weight" if isinstance(linear, FactoredLinear) else "weight"


def reshaped(model: AsrModel, shapes: FfnShapes) -> AsrModel:
    """Returns a model of the same family with untrained feed-forward modules of these shapes; all else is copied.

    Args:
        model: A float model. The new one is on its device and in its mode, training or eval.
        shapes: The shapes for each block.

    Raises:
        MpqError: Not one pair of shapes for each block, a width below 1 or a rank below 0.
    """
    config, blob = model.to_config()
    new = model.from_config(config | {"encoder": asdict(conformer(model).options.with_ffn_shapes(shapes))}, blob)
    prefixes = tuple(f"{name}." for name in feed_forwards(model))
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    missing, unexpected = new.load_state_dict(kept, strict=False)
    assert not unexpected and all(name.startswith(prefixes) for name in missing), "the model is not a float model"
    return new.to(next(model.parameters()).device).train(model.training)


@torch.no_grad()
def sliced(model: AsrModel, shapes: FfnShapes) -> AsrModel:
    """Returns the nested sub-network: the first hidden units and the first ranks of each feed-forward module.

    Each of a module's tensors is the leading corner of the tensor that it was: W1's first rows, W2's first columns.

    Args:
        model: A float model.
        shapes: The shapes for each block, none larger than the model's. A rank stays 0 where it is 0.

    Raises:
        MpqError: As `reshaped`, or a shape that is no part of the module's, which it names.
    """
    new = reshaped(model, shapes)
    for name, given, asked in zip(
        feed_forwards(model), _flat(conformer(model).options.ffn_shapes()), _flat(shapes), strict=True
    ):
        if asked[0] > given[0]:
            raise MpqError(f"{name}: expected a width of {given[0]} units at most, got {asked[0]}")
        if not given[1] and asked[1]:
            raise MpqError(f"{name}: expected rank 0, as the module is not factored, got {asked[1]}; factor it first")
        if given[1] and not 1 <= asked[1] <= given[1]:
            raise MpqError(f"{name}: expected a rank of 1 to {given[1]}, got {asked[1]}")
    for source, target in zip(feed_forwards(model).values(), feed_forwards(new).values(), strict=True):
        own = dict(source.named_parameters())
        for name, parameter in target.named_parameters():
            parameter.copy_(own[name][tuple(slice(size) for size in parameter.shape)])
    return new


def _flat(shapes: FfnShapes) -> list[tuple[int, int]]:
    return [module for block in shapes for module in block]
