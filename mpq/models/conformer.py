"""The Conformer encoder (Gulati et al. 2020), with the differences between frameworks as explicit options.

A block is x += 1/2 FFN(LN x); x += attention(LN x); x += convolution(LN x); x += 1/2 FFN(LN x); x = LN x. Module and
tensor names are those of NeMo. Attention uses relative positions (Transformer-XL, Dai et al. 2019).

Legend: N utterances, T feature frames, F features, T' encoder frames, D width, H heads, C subsampling channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.base import Stage


@dataclass(frozen=True)
class ConformerOptions:
    """The shape of the encoder, and what frameworks do differently.

    Attributes:
        features: F.
        layers: Number of blocks.
        width: D.
        heads: H; divides D.
        ffn_width: Hidden units of both feed-forward modules.
        kernel_size: Of the depthwise convolution; odd.
        subsampling: "striding" (full 3x3 convolutions) or "dw_striding" (the later ones depthwise + pointwise).
        subsampling_factor: 2, 4, 8, ...: one stride-2 convolution for each factor of two.
        subsampling_channels: C.
        use_bias: Biases in feed-forward, attention and convolution modules.
        scale_input: Multiply the subsampled features by sqrt(D).
        conv_norm: "batch_norm" or "layer_norm" after the depthwise convolution.
        norm_eps: Of every LayerNorm.
        conv_mask: "before_depthwise": padded frames are zeroed after the gate, so that they never reach valid ones;
            "none": they are not (ESPnet).
        attention_mask: "key_and_query": padded queries attend to nothing; "key": they attend to the valid frames.
    """

    features: int
    layers: int
    width: int
    heads: int
    ffn_width: int
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

    def __post_init__(self) -> None:
        factor = self.subsampling_factor
        for key, value, expected, is_good in (
            ("width", self.width, f"a multiple of heads, {self.heads}", self.width % self.heads == 0),
            ("kernel_size", self.kernel_size, "an odd number", self.kernel_size % 2 == 1),
            ("subsampling_factor", factor, "a power of two, 2 or more", factor > 1 and factor & (factor - 1) == 0),
        ):
            if not is_good:
                raise MpqError(f"encoder: {key}: expected {expected}, got {value}")
        for key, values in (
            ("subsampling", ("striding", "dw_striding")),
            ("conv_norm", ("batch_norm", "layer_norm")),
            ("conv_mask", ("before_depthwise", "none")),
            ("attention_mask", ("key_and_query", "key")),
        ):
            if getattr(self, key) not in values:
                raise MpqError(f"encoder: {key}: expected {' or '.join(values)}, got {getattr(self, key)!r}")


@dataclass(frozen=True)
class ConformerContext:
    """What the blocks need besides the hidden tensor; no weight enters.

    Attributes:
        feature_lengths: (N,) valid feature frames.
        valid: (N, T') bool; None when no frame is padding.
        positions: (2T' - 1, D) sinusoids of the relative positions T'-1 ... -(T'-1).
    """

    feature_lengths: Tensor
    valid: Tensor | None
    positions: Tensor


def subsampled_length(length: Tensor | int, factor: int) -> Tensor | int:
    """Returns the frames left by stride-2, kernel-3, padding-1 convolutions: L -> (L - 1) // 2 + 1 for each."""
    for _ in range(int(math.log2(factor))):
        length = (length - 1) // 2 + 1
    return length


def relative_positions(frames: int, width: int, device: torch.device | None = None) -> Tensor:
    """Returns the (2 frames - 1, width) sinusoids of positions frames-1 ... -(frames-1); sine in even columns."""
    positions = torch.arange(frames - 1, -frames, -1, dtype=torch.float32, device=device)[:, None]
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device=device) * -(math.log(10000.0) / width))
    table = torch.zeros(2 * frames - 1, width, device=device)
    table[:, 0::2] = torch.sin(positions * rates)
    table[:, 1::2] = torch.cos(positions * rates[: width // 2])
    return table


class ConvSubsampling(nn.Module):
    """Stride-2 convolutions over (time, frequency) and a linear map to the encoder's width."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        channels = options.subsampling_channels
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 2, 1), nn.ReLU()]
        for _ in range(int(math.log2(options.subsampling_factor)) - 1):
            if options.subsampling == "dw_striding":
                layers += [nn.Conv2d(channels, channels, 3, 2, 1, groups=channels), nn.Conv2d(channels, channels, 1)]
            else:
                layers += [nn.Conv2d(channels, channels, 3, 2, 1)]
            layers += [nn.ReLU()]
        self.conv = nn.ModuleList(layers)
        bands = subsampled_length(options.features, options.subsampling_factor)
        self.out = nn.Linear(channels * bands, options.width)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Returns (N, T', D). Padding is zeroed before every convolution and at the end, so it cannot leak in."""
        x = features[:, None]  # (N, 1, T, F)
        for layer in self.conv:
            if isinstance(layer, nn.Conv2d):
                x = layer(_zeroed(x, lengths))
                if layer.stride[0] == 2:
                    lengths = subsampled_length(lengths, 2)
            else:
                x = layer(x)
        x = _zeroed(x, lengths)
        return self.out(x.transpose(1, 2).flatten(2))  # (N, T', C, F') -> (N, T', D)


def _zeroed(x: Tensor, lengths: Tensor) -> Tensor:
    """Returns (N, C, T, F) with the frames beyond (N,) lengths set to zero."""
    frames = torch.arange(x.shape[2], device=x.device)
    return x.masked_fill((frames >= lengths[:, None])[:, None, :, None], 0.0)


class FeedForward(nn.Module):
    """linear, Swish, linear."""

    def __init__(self, width: int, hidden: int, use_bias: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden, bias=use_bias)
        self.linear2 = nn.Linear(hidden, width, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class RelPosAttention(nn.Module):
    """Multi-head self-attention with relative positions: scores ((q + u) k' + (q + v) p') / sqrt(D / H)."""

    def __init__(self, width: int, heads: int, use_bias: bool, mask: str) -> None:
        super().__init__()
        self.heads, self.mask = heads, mask
        self.linear_q = nn.Linear(width, width, bias=use_bias)
        self.linear_k = nn.Linear(width, width, bias=use_bias)
        self.linear_v = nn.Linear(width, width, bias=use_bias)
        self.linear_out = nn.Linear(width, width, bias=use_bias)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x: Tensor, context: ConformerContext) -> Tensor:
        q, k, v = (
            self._split(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v)
        )  # (N, H, T', D/H)
        p = self._split(self.linear_pos(context.positions)[None])  # (1, H, 2T'-1, D/H); q, k, v: (N, H, T', D/H)
        scale = 1 / math.sqrt(q.shape[-1])
        scores = _relative_shift(((q + self.pos_bias_v[:, None]) * scale) @ p.transpose(2, 3))  # (N, H, T', T')
        if context.valid is not None:
            scores = scores.masked_fill(~context.valid[:, None, None, :], -torch.inf)
        mixed = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, attn_mask=scores, scale=scale)
        if context.valid is not None and self.mask == "key_and_query":
            mixed = mixed.masked_fill(~context.valid[:, None, :, None], 0.0)
        return self.linear_out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _relative_shift(x: Tensor) -> Tensor:
    """Returns (N, H, T, T) whose [i, j] is x[i, T-1-i+j]: from columns of relative to columns of absolute position."""
    n, h, t, p = x.shape
    return F.pad(x, (1, 0)).view(n, h, p + 1, t)[:, :, 1:].view(n, h, t, p)[..., :t]


class ConvolutionModule(nn.Module):
    """pointwise to 2D, gate, depthwise over time, norm, Swish, pointwise."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        width, kernel, bias = options.width, options.kernel_size, options.use_bias
        self.mask, self.norm = options.conv_mask, options.conv_norm
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
        if self.norm == "layer_norm":
            x = self.batch_norm(x.transpose(1, 2))
        else:
            x = self.batch_norm(x).transpose(1, 2)  # (N, T', D)
        return _pointwise(self.pointwise_conv2, F.silu(x))


def _pointwise(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """Returns a kernel-1 convolution of (N, T, D) without the two transpositions that Conv1d would need."""
    return F.linear(x, convolution.weight.squeeze(2), convolution.bias)


class ConformerBlock(nn.Module):
    """One block, in four steps that each add to the hidden tensor (the last one also normalises it)."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        width, eps, bias = options.width, options.norm_eps, options.use_bias
        self.norm_feed_forward1 = nn.LayerNorm(width, eps=eps)
        self.feed_forward1 = FeedForward(width, options.ffn_width, bias)
        self.norm_self_att = nn.LayerNorm(width, eps=eps)
        self.self_attn = RelPosAttention(width, options.heads, bias, options.attention_mask)
        self.norm_conv = nn.LayerNorm(width, eps=eps)
        self.conv = ConvolutionModule(options)
        self.norm_feed_forward2 = nn.LayerNorm(width, eps=eps)
        self.feed_forward2 = FeedForward(width, options.ffn_width, bias)
        self.norm_out = nn.LayerNorm(width, eps=eps)

    def steps(self) -> tuple[tuple[str, Callable[[Tensor, ConformerContext], Tensor]], ...]:
        """Returns (submodule whose weights it uses, function) of the four steps; in order they are the block."""
        return (
            ("feed_forward1", lambda x, _: x + 0.5 * self.feed_forward1(self.norm_feed_forward1(x))),
            ("self_attn", lambda x, context: x + self.self_attn(self.norm_self_att(x), context)),
            ("conv", lambda x, context: x + self.conv(self.norm_conv(x), context)),
            ("feed_forward2", lambda x, _: self.norm_out(x + 0.5 * self.feed_forward2(self.norm_feed_forward2(x)))),
        )


class ConformerEncoder(nn.Module):
    """Subsampling and a stack of blocks; `stages` is its forward pass."""

    def __init__(self, options: ConformerOptions) -> None:
        super().__init__()
        self.options = options
        self.pre_encode = ConvSubsampling(options)
        self.layers = nn.ModuleList(ConformerBlock(options) for _ in range(options.layers))

    def stages(self, prefix: str) -> tuple[Stage, ...]:
        """Returns the chain from (N, T, F) features to the (N, T', D) output; `prefix` is this module's name."""
        stages = [Stage((f"{prefix}.pre_encode.",), self._subsample)]
        for index, block in enumerate(self.layers):
            stages += [Stage((f"{prefix}.layers.{index}.{name}.",), step) for name, step in block.steps()]
        return tuple(stages)

    def context(self, feature_lengths: Tensor, frames: int) -> ConformerContext:
        """Returns the context of (N, frames, F) features with (N,) valid frames."""
        encoded_frames = subsampled_length(frames, self.options.subsampling_factor)
        lengths = subsampled_length(feature_lengths, self.options.subsampling_factor)
        valid = torch.arange(encoded_frames, device=lengths.device) < lengths[:, None]  # (N, T')
        positions = relative_positions(encoded_frames, self.options.width, lengths.device)
        return ConformerContext(feature_lengths, None if bool(valid.all()) else valid, positions)

    def _subsample(self, features: Tensor, context: ConformerContext) -> Tensor:
        x = self.pre_encode(features, context.feature_lengths)
        return x * math.sqrt(self.options.width) if self.options.scale_input else x
