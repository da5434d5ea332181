"""The Conformer encoder (Gulati et al. 2020), with the differences between frameworks as explicit options.

A block is x += 1/2 FFN(LN x); x += attention(LN x); x += convolution(LN x); x += 1/2 FFN(LN x); x = LN x. Module and
tensor names are those of NeMo. Attention uses relative positions (Transformer-XL, Dai et al. 2019).

Legend: N utterances, T feature frames, F features, T' encoder frames, D width, H heads, C subsampling channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.batch_norm import batch_norm
from mpq.models.positions import sinusoids
from mpq.models.segment import Segment

Length = TypeVar("Length", int, Tensor)
"""One number of frames, or the (N,) numbers of the utterances of a batch."""


@dataclass(frozen=True)
class ConformerOptions:
    """The shape of the encoder, and the differences between frameworks.

    Attributes:
        features: F.
        layers: Number of blocks.
        width: D.
        heads: H; divides D.
        ffn_width: Hidden units of the first (macaron) feed-forward module: one number for every block, or a list with
            one for each.
        ffn2_width: The same for the second module; None: as in the first.
        ffn_rank: Rank of both matrices of the first module, a number or a list; 0: not factored.
        ffn2_rank: The same for the second module; None: as in the first.
        kernel_size: Frames that the depthwise convolution reads; odd.
        subsampling: "striding" (full 3x3 convolutions) or "dw_striding" (the later ones depthwise + pointwise).
        subsampling_factor: 2, 4, 8, ...: one stride-2 convolution for each factor of two.
        subsampling_channels: C.
        subsampling_padding: Frames and bands of zeros around the input of a strided convolution: 1, or 0 (ESPnet).
        use_bias: Biases in feed-forward, attention and convolution modules.
        scale_input: Multiply the subsampled features by sqrt(D).
        conv_norm: "batch_norm" or "layer_norm" after the depthwise convolution.
        norm_eps: The epsilon of every LayerNorm.
        conv_mask: "before_depthwise": padded frames are zeroed after the gate, so that they never reach valid ones;
            "none": they are not (ESPnet).
        attention_mask: "key_and_query": padded queries attend to nothing; "key": they attend to the valid frames.
        dropout: Dropout in training: of the subsampling's output, the feed-forward activations, each module's output
            and the attention weights.
    """

    features: int
    layers: int
    width: int
    heads: int
    ffn_width: int | Sequence[int]
    kernel_size: int
    subsampling: str
    subsampling_factor: int
    subsampling_channels: int
    use_bias: bool = True
    scale_input: bool = True
    conv_norm: str = "batch_norm"
    norm_eps: float = 1e-5
    conv_mask: str = "before_depthwise"
    attention_mask: str = "key_and_query"
    ffn2_width: int | Sequence[int] | None = None
    ffn_rank: int | Sequence[int] = 0
    ffn2_rank: int | Sequence[int] | None = None
    subsampling_padding: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        factor = self.subsampling_factor
        for key, value, expected, is_good in (
            ("width", self.width, f"a multiple of heads, {self.heads}", self.width % self.heads == 0),
            ("kernel_size", self.kernel_size, "an odd number", self.kernel_size % 2 == 1),
            ("subsampling_factor", factor, "a power of two, 2 or more", factor > 1 and factor & (factor - 1) == 0),
            ("subsampling_padding", self.subsampling_padding, "0 or 1", self.subsampling_padding in (0, 1)),
            ("dropout", self.dropout, "0 or more and less than 1", 0 <= self.dropout < 1),
        ):
            if not is_good:
                raise MpqError(f"encoder: {key}: expected {expected}, got {value}")
        for key, least in (("ffn_width", 1), ("ffn2_width", 1), ("ffn_rank", 0), ("ffn2_rank", 0)):
            given = getattr(self, key)
            if given is not None and not _fits(given, self.layers, least):
                expected = f"{least} or more, one number or one for each of the {self.layers} blocks"
                raise MpqError(f"encoder: {key}: expected {expected}, got {given}")
        for key, values in (
            ("subsampling", ("striding", "dw_striding")),
            ("conv_norm", ("batch_norm", "layer_norm")),
            ("conv_mask", ("before_depthwise", "none")),
            ("attention_mask", ("key_and_query", "key")),
        ):
            if getattr(self, key) not in values:
                raise MpqError(f"encoder: {key}: expected {' or '.join(values)}, got {getattr(self, key)!r}")

    def ffn_shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Returns for each block the (width, rank) of its first and of its second feed-forward module."""
        first, rank = _for_each(self.ffn_width, self.layers), _for_each(self.ffn_rank, self.layers)
        second = first if self.ffn2_width is None else _for_each(self.ffn2_width, self.layers)
        second_rank = rank if self.ffn2_rank is None else _for_each(self.ffn2_rank, self.layers)
        return list(zip(zip(first, rank, strict=True), zip(second, second_rank, strict=True), strict=True))

    def with_ffn_shapes(self, shapes: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> "ConformerOptions":
        """Returns these options with other feed-forward modules: the inverse of `ffn_shapes`, in its shortest form.

        That is one number where all blocks agree, and None for the second module where it is as the first.

        Raises:
            MpqError: Not one pair of shapes for each block, a width below 1 or a rank below 0.
        """
        if len(shapes) != self.layers:
            raise MpqError(
                f"encoder: feed-forward shapes: expected one pair for each of {self.layers} blocks, got {len(shapes)}"
            )
        widths, ranks, widths2, ranks2 = (
            _shortest([block[module][part] for block in shapes]) for module in (0, 1) for part in (0, 1)
        )
        return replace(
            self,
            ffn_width=widths,
            ffn_rank=ranks,
            ffn2_width=None if widths2 == widths else widths2,
            ffn2_rank=None if ranks2 == ranks else ranks2,
        )


def _for_each(value: int | Sequence[int], layers: int) -> list[int]:
    return [value] * layers if isinstance(value, int) else list(value)


def _shortest(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _fits(value: int | Sequence[int], layers: int, least: int) -> bool:
    values = _for_each(value, layers)
    return len(values) == layers and min(values) >= least


@dataclass(frozen=True)
class ConformerContext:
    """The inputs of the blocks besides the hidden tensor; they depend on no weight.

    Attributes:
        feature_lengths: (N,) valid feature frames.
        valid: (N, T') bool; None when no frame is padding.
        positions: (2T' - 1, D) sinusoids of the relative positions T'-1 ... -(T'-1).
    """

    feature_lengths: Tensor
    valid: Tensor | None
    positions: Tensor


def subsampled_length(length: Length, factor: int, padding: int = 1) -> Length:
    """Returns the frames left by stride-2, kernel-3 convolutions: L -> (L - 1) // 2 + padding for each."""
    for _ in range(int(math.log2(factor))):
        length = (length - 1) // 2 + padding
    return length


class ConvSubsampling(nn.Module):
    """Stride-2 convolutions over (time, frequency) and a linear map to the encoder's width."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        channels, padding = options.subsampling_channels, options.subsampling_padding
        self.padding = padding
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 2, padding), nn.ReLU()]
        for _ in range(int(math.log2(options.subsampling_factor)) - 1):
            if options.subsampling == "dw_striding":
                layers += [
                    nn.Conv2d(channels, channels, 3, 2, padding, groups=channels),
                    nn.Conv2d(channels, channels, 1),
                ]
            else:
                layers += [nn.Conv2d(channels, channels, 3, 2, padding)]
            layers += [nn.ReLU()]
        self.conv = nn.ModuleList(layers)
        bands = subsampled_length(options.features, options.subsampling_factor, padding)
        self.out = nn.Linear(channels * bands, options.width)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Returns (N, T', D). Padding is zeroed before every convolution and at the end, so it cannot leak in."""
        x = features[:, None]  # (N, 1, T, F)
        for layer in self.conv:
            if isinstance(layer, nn.Conv2d):
                x = layer(_zeroed(x, lengths))
                if layer.stride[0] == 2:
                    lengths = subsampled_length(lengths, 2, self.padding)
            else:
                x = layer(x)
        x = _zeroed(x, lengths)
        out: Tensor = self.out(x.transpose(1, 2).flatten(2))  # (N, T', C, F') -> (N, T', D)
        return out


def _zeroed(x: Tensor, lengths: Tensor) -> Tensor:
    """Returns (N, C, T, F) with the frames beyond (N,) lengths set to zero."""
    frames = torch.arange(x.shape[2], device=x.device)
    return x.masked_fill((frames >= lengths[:, None])[:, None, :, None], 0.0)


class FactoredLinear(nn.Module):
    """A linear map of low rank, W = A B (Li et al. 2023, section 2.1): `inner` is B, the projection, without bias."""

    def __init__(self, inputs: int, outputs: int, rank: int, use_bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, outputs, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x))
        return out


class FeedForward(nn.Module):
    """linear, Swish, linear; both factored where the rank is not 0."""

    def __init__(self, width: int, hidden: int, rank: int, use_bias: bool, dropout: float) -> None:
        super().__init__()
        self.linear1 = _linear(width, hidden, rank, use_bias)
        self.linear2 = _linear(hidden, width, rank, use_bias)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(F.dropout(F.silu(self.linear1(x)), self.dropout, self.training))
        return out


def _linear(inputs: int, outputs: int, rank: int, use_bias: bool) -> FactoredLinear | nn.Linear:
    return FactoredLinear(inputs, outputs, rank, use_bias) if rank else nn.Linear(inputs, outputs, bias=use_bias)


class RelPosAttention(nn.Module):
    """Multi-head self-attention with relative positions: scores ((q + u) k' + (q + v) p') / sqrt(D / H)."""

    def __init__(self, width: int, heads: int, use_bias: bool, mask: str, dropout: float) -> None:
        super().__init__()
        self.heads, self.mask, self.dropout = heads, mask, dropout
        self.linear_q = nn.Linear(width, width, bias=use_bias)
        self.linear_k = nn.Linear(width, width, bias=use_bias)
        self.linear_v = nn.Linear(width, width, bias=use_bias)
        self.linear_out = nn.Linear(width, width, bias=use_bias)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x: Tensor, context: ConformerContext) -> Tensor:
        q, k, v = (self._split(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        p = self._split(self.linear_pos(context.positions)[None])  # (1, H, 2T'-1, D/H); q, k, v: (N, H, T', D/H)
        scale = 1 / math.sqrt(q.shape[-1])
        scores = _relative_shift(((q + self.pos_bias_v[:, None]) * scale) @ p.transpose(2, 3))  # (N, H, T', T')
        if context.valid is not None:
            scores = scores.masked_fill(~context.valid[:, None, None, :], -torch.inf)
        dropout = self.dropout if self.training else 0.0
        q = q + self.pos_bias_u[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, dropout_p=dropout, scale=scale)
        if context.valid is not None and self.mask == "key_and_query":
            mixed = mixed.masked_fill(~context.valid[:, None, :, None], 0.0)
        out: Tensor = self.linear_out(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


def _relative_shift(x: Tensor) -> Tensor:
    """Returns (N, H, T, T) whose [i, j] is x[i, T-1-i+j]: from columns of relative to columns of absolute position."""
    n, h, t, p = x.shape
    return F.pad(x, (1, 0)).view(n, h, p + 1, t)[:, :, 1:].view(n, h, t, p)[..., :t]


class ConvolutionModule(nn.Module):
    """pointwise to 2D, gate, depthwise over time, norm, Swish, pointwise."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        width, kernel, bias = options.width, options.kernel_size, options.use_bias
        self.mask = options.conv_mask
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=bias)
        is_layer_norm = options.conv_norm == "layer_norm"
        self.batch_norm = nn.LayerNorm(width, eps=options.norm_eps) if is_layer_norm else nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, x: Tensor, context: ConformerContext) -> Tensor:
        x = F.glu(_pointwise(self.pointwise_conv1, x), dim=-1)  # (N, T', D)
        if context.valid is not None and self.mask == "before_depthwise":
            x = x.masked_fill(~context.valid[:, :, None], 0.0)
        x = self.depthwise_conv(x.transpose(1, 2))  # (N, D, T')
        if isinstance(self.batch_norm, nn.LayerNorm):
            x = self.batch_norm(x.transpose(1, 2))
        else:
            x = batch_norm(self.batch_norm, x, context.valid).transpose(1, 2)  # (N, T', D)
        return _pointwise(self.pointwise_conv2, F.silu(x))


def _pointwise(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """Returns a kernel-1 convolution of (N, T, D) without the two transpositions that Conv1d would need."""
    return F.linear(x, convolution.weight.squeeze(2), convolution.bias)


class ConformerBlock(nn.Module):
    """One block, in four steps that each add to the hidden tensor (the last one also normalises it).

    Args:
        options: The shape of the encoder.
        ffn_shapes: (width, rank) of the first and of the second feed-forward module.
    """

    def __init__(self, options: ConformerOptions, ffn_shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        width, eps, bias, self.dropout = options.width, options.norm_eps, options.use_bias, options.dropout
        self.norm_feed_forward1 = nn.LayerNorm(width, eps=eps)
        self.feed_forward1 = FeedForward(width, *ffn_shapes[0], bias, options.dropout)
        self.norm_self_att = nn.LayerNorm(width, eps=eps)
        self.self_attn = RelPosAttention(width, options.heads, bias, options.attention_mask, options.dropout)
        self.norm_conv = nn.LayerNorm(width, eps=eps)
        self.conv = ConvolutionModule(options)
        self.norm_feed_forward2 = nn.LayerNorm(width, eps=eps)
        self.feed_forward2 = FeedForward(width, *ffn_shapes[1], bias, options.dropout)
        self.norm_out = nn.LayerNorm(width, eps=eps)

    def steps(self) -> tuple[tuple[str, Callable[[Tensor, ConformerContext], Tensor]], ...]:
        """Returns (submodule whose weights it uses, function) of the four steps; in order they are the block."""
        return (
            ("feed_forward1", lambda x, _: x + 0.5 * self._drop(self.feed_forward1(self.norm_feed_forward1(x)))),
            ("self_attn", lambda x, context: x + self._drop(self.self_attn(self.norm_self_att(x), context))),
            ("conv", lambda x, context: x + self._drop(self.conv(self.norm_conv(x), context))),
            ("feed_forward2", lambda x, _: self.norm_out(x + 0.5 * self._drop(self._second(x)))),
        )

    def _second(self, x: Tensor) -> Tensor:
        out: Tensor = self.feed_forward2(self.norm_feed_forward2(x))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class ConformerEncoder(nn.Module):
    """Subsampling and a stack of blocks; `segments` is its forward pass."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        self.options = options
        self.pre_encode = ConvSubsampling(options)
        self.layers = nn.ModuleList(ConformerBlock(options, shapes) for shapes in options.ffn_shapes())

    def segments(self, prefix: str) -> tuple[Segment, ...]:
        """Returns the chain from (N, T, F) features to the (N, T', D) output; `prefix` is this module's name."""
        segments = [Segment((f"{prefix}.pre_encode.",), self._subsample)]
        for index, block in enumerate(self.blocks()):
            segments += [Segment((f"{prefix}.layers.{index}.{name}.",), step) for name, step in block.steps()]
        return tuple(segments)

    def blocks(self) -> list[ConformerBlock]:
        """Returns the blocks, in order."""
        return cast(list[ConformerBlock], list(self.layers))  # torch forgets what a ModuleList holds

    def context(self, feature_lengths: Tensor, frames: int) -> ConformerContext:
        """Returns the context of (N, frames, F) features with (N,) valid frames."""
        encoded_frames, lengths = self.encoded_lengths(frames), self.encoded_lengths(feature_lengths)
        valid = torch.arange(encoded_frames, device=lengths.device) < lengths[:, None]  # (N, T')
        relative = torch.arange(encoded_frames - 1, -encoded_frames, -1, device=lengths.device)
        positions = sinusoids(relative, self.options.width)
        return ConformerContext(feature_lengths, None if bool(valid.all()) else valid, positions)

    def encoded_lengths(self, feature_lengths: Length) -> Length:
        """Returns the encoder frames for (N,) valid feature frames, or for one number of them."""
        return subsampled_length(feature_lengths, self.options.subsampling_factor, self.options.subsampling_padding)

    def _subsample(self, features: Tensor, context: ConformerContext) -> Tensor:
        x = self.pre_encode(features, context.feature_lengths)
        x = x * math.sqrt(self.options.width) if self.options.scale_input else x
        return F.dropout(x, self.options.dropout, self.training)
