"""Foldings: the same function with fewer vectors to store.

Many of a Conformer's vectors only add to others, and some have no effect at all. Here they move into those that are
left, and become constants: zeros, and ones for a variance. No matrix or kernel (`AsrModel.weights`) changes.

- A bias of the keys adds the same to all scores of a query, and softmax takes it away again.
- A bias of the values passes the attention weights, which sum to one, and adds to the output's bias.
- A bias of the queries only ever meets the position biases u and v (Dai et al. 2019, section 3.3).
- A bias of a norm adds to the bias of each linear map that reads the norm's output.
- BatchNorm outside training is a scale and a shift, and the shift takes in the bias of the convolution before it.
- The bias of a depthwise convolution adds to that of the pointwise one behind it.

`FOLDINGS` says which of them hold for which module; what is not listed there stays as it is. Only frames of padding
become others, where nothing reads them.

Legend: D inputs, C outputs.
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from mpq.models.attention_decoder import Attention, DecoderLayer, TransformerDecoder
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerBlock, ConvolutionModule, ConvSubsampling, FactoredLinear, RelPosAttention
from mpq.runtime import one_thread

Linear = nn.Linear | nn.Conv1d | nn.Conv2d | FactoredLinear
"""A linear map of each frame alone; a convolution has kernels of one."""


def folded_state(model: AsrModel) -> dict[str, Tensor]:
    """Returns a state dict for a model of the same shape that computes the same, to rounding, outside training.

    The sums are made in double precision, on the model's device.
    """
    names = {ref.name for ref in model.weights()}
    kept = {id(one): one for name, one in model.named_parameters() if name in names}  # not copied, since not changed
    folded = copy.deepcopy(model, dict(kept))
    for tensor in (*folded.parameters(), *folded.buffers()):
        if id(tensor) not in kept and tensor.is_floating_point():
            tensor.data = tensor.data.double()
    with torch.no_grad(), one_thread():
        for module in folded.modules():
            if fold := FOLDINGS.get(type(module)):
                fold(module)
    found = folded.state_dict()
    return {name: found[name].to(tensor.dtype) for name, tensor in model.state_dict().items()}


def _fold_subsampling(module: ConvSubsampling) -> None:
    for first, second in itertools.pairwise(module.conv):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):  # no activation between them
            _move(first, second)


def _fold_block(block: ConformerBlock) -> None:
    _move(block.norm_feed_forward1, block.feed_forward1.linear1)
    _move(block.norm_feed_forward2, block.feed_forward2.linear1)
    _move(block.norm_conv, block.conv.pointwise_conv1)
    attention = block.self_attn
    _move(block.norm_self_att, attention.linear_q, attention.linear_k, attention.linear_v)
    if (bias := attention.linear_q.bias) is not None:
        attention.pos_bias_u.add_(bias.view_as(attention.pos_bias_u))
        attention.pos_bias_v.add_(bias.view_as(attention.pos_bias_v))
        bias.zero_()
    _drop_key_bias(attention)
    # a masked query has no attention weights, and must not be read by the convolution
    if attention.mask == "key" or block.conv.mask == "before_depthwise":
        _move(attention.linear_v, attention.linear_out)
    if isinstance(block.conv.batch_norm, nn.BatchNorm1d):
        _fold_batch_norm(block.conv, block.conv.batch_norm)


def _fold_batch_norm(module: ConvolutionModule, norm: nn.BatchNorm1d) -> None:
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight / (variance + norm.eps).sqrt()
    bias = module.depthwise_conv.bias
    norm.bias.sub_(mean * scale)
    if bias is not None:
        norm.bias.add_(bias * scale)
        bias.zero_()
    norm.weight.copy_(scale * math.sqrt(1 + norm.eps))
    mean.zero_()
    variance.fill_(1)


def _fold_decoder_layer(layer: DecoderLayer) -> None:
    own, other = layer.self_attn, layer.src_attn
    _move(layer.norm_self_att, own.linear_q, own.linear_k, own.linear_v)
    _move(layer.norm_src_att, other.linear_q)
    _move(layer.norm_feed_forward, layer.linear1)
    for attention in (own, other):
        _drop_key_bias(attention)
        _move(attention.linear_v, attention.linear_out)


def _fold_decoder(decoder: TransformerDecoder) -> None:
    _move(decoder.after_norm, decoder.output)


FOLDINGS: dict[type[nn.Module], Callable[[nn.Module], None]] = cast(
    dict[type[nn.Module], Callable[[nn.Module], None]],
    {
        ConvSubsampling: _fold_subsampling,
        ConformerBlock: _fold_block,
        DecoderLayer: _fold_decoder_layer,
        TransformerDecoder: _fold_decoder,
    },
)
"""{module: what becomes of its vectors}, in double precision and without gradients."""


def _move(source: nn.LayerNorm | Linear, *readers: Linear) -> None:
    """Moves a bias into those of all linear maps that read the result, if each of them has one."""
    bias, into = _bias(source), [_bias(reader) for reader in readers]
    if bias is None or any(one is None for one in into):
        return
    for reader, own in zip(readers, into, strict=True):
        cast(Tensor, own).add_(_product(reader, bias))
    bias.zero_()


def _bias(module: nn.LayerNorm | Linear) -> Tensor | None:
    return module.outer.bias if isinstance(module, FactoredLinear) else module.bias


def _product(linear: Linear, x: Tensor) -> Tensor:
    """Returns (C,), the (D,) vector times the matrix of a linear map."""
    if isinstance(linear, FactoredLinear):
        return linear.outer.weight.double() @ (linear.inner.weight.double() @ x)
    return linear.weight.flatten(1).double() @ x


def _drop_key_bias(attention: RelPosAttention | Attention) -> None:
    if attention.linear_k.bias is not None:
        attention.linear_k.bias.zero_()
