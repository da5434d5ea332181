"""The Transformer decoder of a hybrid CTC/attention model (Vaswani et al. 2017; Li et al. 2023, section 2).

A layer is x += attention(LN x) over the tokens so far; x += attention(LN x, encoded); x += FFN(LN x), with ReLU. Tokens
are embedded, scaled by sqrt(D) and given absolute sinusoids. <sos> and <eos> are one class, the last.

Legend: N utterances, U tokens with the leading <sos>, T' encoder frames, D width, H heads, C classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.positions import sinusoids


@dataclass(frozen=True)
class DecoderOptions:
    """The shape of the decoder.

    Attributes:
        layers: Number of layers.
        heads: H; divides the encoder's width.
        ffn_width: Hidden units of the feed-forward modules.
        dropout: Dropout of embeddings, attention, feed-forward activations and each module, in training.
    """

    layers: int
    heads: int
    ffn_width: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for key, least in (("layers", 1), ("heads", 1), ("ffn_width", 1)):
            if getattr(self, key) < least:
                raise MpqError(f"decoder: {key}: expected {least} or more, got {getattr(self, key)}")
        if not 0 <= self.dropout < 1:
            raise MpqError(f"decoder: dropout: expected 0 or more and less than 1, got {self.dropout}")


@dataclass(frozen=True)
class DecoderContext:
    """The inputs of the decoder besides its hidden state; they depend on no weight.

    Attributes:
        prefixes: (N, U) tokens, starting with <sos>.
        causal: (U, U) bool: whether a position (row) may attend to another (column).
        valid: (N, 1, 1, T') bool: the frames that may be attended to.
    """

    prefixes: Tensor
    causal: Tensor
    valid: Tensor


Hidden = tuple[Tensor, Tensor]
"""((N, T', D) encoder output, (N, U, D)): the state that goes from layer to layer."""


class Attention(nn.Module):
    """Multi-head attention of queries to a memory."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (N, U, D). `mask` is bool, broadcast to (N, H, U, M); True may be attended to."""
        return self.attend(x, self.keys_values(memory), mask)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (N, H, M, D/H) keys and values of a memory (N, M, D)."""
        return self._split(self.linear_k(memory)), self._split(self.linear_v(memory))

    def attend(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Returns the result of `forward`, from the keys and values of the memory."""
        dropout = self.dropout if self.training else 0.0
        q = self._split(self.linear_q(x))
        mixed = F.scaled_dot_product_attention(q, *keys_values, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.linear_out(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class DecoderLayer(nn.Module):
    """One layer."""

    def __init__(self, width: int, options: DecoderOptions) -> None:
        super().__init__()
        self.dropout = options.dropout
        self.norm_self_att = nn.LayerNorm(width)
        self.self_attn = Attention(width, options.heads, options.dropout)
        self.norm_src_att = nn.LayerNorm(width)
        self.src_attn = Attention(width, options.heads, options.dropout)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, options.ffn_width)
        self.linear2 = nn.Linear(options.ffn_width, width)

    def forward(self, hidden: Hidden, context: DecoderContext) -> Hidden:
        encoded, x = hidden
        return encoded, self.step(x, self.src_attn.keys_values(encoded), context)

    def step(self, x: Tensor, memory: tuple[Tensor, Tensor], context: DecoderContext) -> Tensor:
        """Returns (N, U, D) from the same and the keys and values of the encoder output."""
        normed = self.norm_self_att(x)
        x = x + self._drop(self.self_attn(normed, normed, context.causal))
        x = x + self._drop(self.src_attn.attend(self.norm_src_att(x), memory, context.valid))
        activations = self._drop(F.relu(self.linear1(self.norm_feed_forward(x))))
        return x + self._drop(self.linear2(activations))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TransformerDecoder(nn.Module):
    """Embedding, layers, output; `steps` are its forward pass.

    Args:
        width: D, the encoder's.
        classes: C: the tokens and, last, <sos>/<eos>.
        options: The shape.
    """

    def __init__(self, width: int, classes: int, options: DecoderOptions) -> None:
        super().__init__()
        if width % options.heads:
            raise MpqError(f"decoder: heads: expected a divisor of the width {width}, got {options.heads}")
        self.options = options
        self.embed = nn.Embedding(classes, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(width, options) for _ in range(options.layers))
        self.after_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, prefixes: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """Returns the (N, U, C) logits of the token after each position.

        Args:
            prefixes: (N, U) tokens, starting with <sos>. What follows an utterance's last token may be any token: no
                position looks ahead.
            encoded: (N, T', D).
            encoded_lengths: (N,) valid frames.
        """
        context = decoder_context(prefixes, encoded_lengths, encoded.shape[1])
        hidden = encoded
        for _, step in self.steps():
            hidden = step(hidden, context)
        return hidden

    def scorer(self, encoded: Tensor, encoded_lengths: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the function that a search asks for the next token.

        Its arguments are (B, U) prefixes and the (B,) utterances that they belong to, its result (B, C)
        log-probabilities. The keys and values of the encoder output are made once, not with every token.
        """
        layers = self._layers()
        memories = [layer.src_attn.keys_values(encoded) for layer in layers]

        def score(prefixes: Tensor, utterances: Tensor) -> Tensor:
            context = decoder_context(prefixes, encoded_lengths[utterances], encoded.shape[1])
            _, x = self._embedded(encoded, context)
            for layer, (keys, values) in zip(layers, memories, strict=True):
                x = layer.step(x, (keys[utterances], values[utterances]), context)
            return self._logits((encoded, x[:, -1]), context).log_softmax(dim=-1)

        return score

    def steps(self) -> tuple[tuple[tuple[str, ...], Callable[[Any, DecoderContext], Any]], ...]:
        """Returns (submodules, function): the chain from the (N, T', D) encoder output to the (N, U, C) logits.

        Between the embedding and the output, (N, U, D) goes along with the encoder output (`Hidden`).
        """
        layers = tuple(((f"layers.{index}",), layer) for index, layer in enumerate(self._layers()))
        return ((("embed",), self._embedded), *layers, (("after_norm", "output"), self._logits))

    def _embedded(self, encoded: Tensor, context: DecoderContext) -> Hidden:
        x = self.embed(context.prefixes) * math.sqrt(self.embed.embedding_dim)
        x = x + sinusoids(torch.arange(x.shape[1], device=x.device), x.shape[2])
        return encoded, F.dropout(x, self.options.dropout, self.training)

    def _logits(self, hidden: Hidden, _: DecoderContext) -> Tensor:
        logits: Tensor = self.output(self.after_norm(hidden[1]))
        return logits

    def _layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers))  # torch forgets what a ModuleList holds


def decoder_context(prefixes: Tensor, encoded_lengths: Tensor, frames: int) -> DecoderContext:
    """Returns the context of (N, U) tokens that start with <sos>, and of (N,) valid of `frames` encoder frames."""
    valid = torch.arange(frames, device=encoded_lengths.device) < encoded_lengths[:, None]  # (N, T')
    steps = torch.arange(prefixes.shape[1], device=prefixes.device)
    return DecoderContext(prefixes, steps <= steps[:, None], valid[:, None, None, :])
