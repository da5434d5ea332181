"""The interface of a speech recogniser, whatever framework trained it.

A model is an encoder and its heads (`mpq.models.heads`), each of them a chain of *segments*: features -> ... -> encoder
output, and encoder output -> ... -> logits. Each segment is a function of the hidden state and owns the weights whose
names start with its prefixes. So a change of one weight leaves everything before its segment as it was, which makes
the exact sensitivity cheap, and `encode` is nothing but the chain.

Legend: N utterances, S samples, T feature frames, F features, T' encoder frames, D encoder width, V tokens with blank,
U tokens of a transcript.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.heads import Head, Targets
from mpq.models.segment import Segment
from mpq.speech.decoding import GREEDY, DecodeOptions
from mpq.speech.features import LogMelOptions
from mpq.speech.text import Tokenizer


@dataclass(frozen=True)
class WeightRef:
    """A quantizable weight tensor.

    Attributes:
        name: The tensor's name in the user's checkpoint and in the model's state dict.
        kind: linear, conv1d, conv1d_depthwise, conv2d, conv2d_depthwise, embedding, or packed_projection (several
            linear maps in one matrix, as torch.nn.MultiheadAttention keeps q, k and v), or recurrent (the four matrices
            of an LSTM's gates, or the three of a GRU's, in one).
        shape: Output channels first.
        numel: Number of weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int


@dataclass(frozen=True)
class OutputContext:
    """The inputs of all segments of a model besides the hidden state, and the rows of its outputs that count.

    Attributes:
        inputs: {"encoder" or the name of a head: the context of its segments}.
        rows: {output: (N, ...) bool, in the shape of its logits without the last axis}; the outputs are "encoder" and
            those of the heads (`Head.output`).
    """

    inputs: dict[str, Any]
    rows: dict[str, Tensor]


class AsrModel(nn.Module, ABC):
    """A trained recogniser: an encoder and its heads, in eval mode."""

    family: str
    """The family that the checkpoint comes from (`mpq.models.families`): "nemo", ..."""
    architecture: str
    """A name such as "conformer-ctc"."""
    sample_rate: int
    """Hz."""
    min_samples: int
    """The shortest waveform that the model accepts, samples at `sample_rate`."""
    blank_id: int
    tokenizer: Tokenizer
    quantized_bits: dict[str, float]
    """{weight name: bits} of a model that was read from an artifact; empty otherwise."""
    quantized_bytes: dict[str, int]
    """{weight name: bytes in the artifact}; empty otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.quantized_bits, self.quantized_bytes = {}, {}

    @property
    @abstractmethod
    def mel(self) -> LogMelOptions:
        """The log-mel features that the model takes (others may follow them)."""

    @property
    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """The encoder's chain, from the features to the encoder output."""

    @property
    @abstractmethod
    def output_heads(self) -> tuple[Head, ...]:
        """The heads; the first is the default."""

    @abstractmethod
    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (N, T, F) features and (N,) valid frames of (N, S) float32 waveforms in [-1, 1)."""

    @abstractmethod
    def feature_lengths(self, waveform_lengths: Tensor) -> Tensor:
        """Returns the (N,) valid feature frames of waveforms of (N,) samples."""

    @abstractmethod
    def context(self, feature_lengths: Tensor, frames: int) -> Any:
        """Returns the masks and positions that the encoder's segments need besides the hidden tensor.

        Args:
            feature_lengths: (N,) valid feature frames.
            frames: T of the padded features.
        """

    @abstractmethod
    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        """Returns the (N,) valid encoder frames for (N,) valid feature frames."""

    @abstractmethod
    def to_config(self) -> tuple[dict[str, Any], bytes]:
        """Returns a JSON object and a blob (the tokenizer) that rebuild the model without its weights."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any], blob: bytes) -> Self:
        """Returns a model with untrained weights from what `to_config` returned."""

    def encode(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (N, T', D) encoder output and its (N,) valid frames for (N, T, F) features."""
        context = self.context(feature_lengths, features.shape[1])
        hidden = features
        for segment in self.segments:
            hidden = segment.run(hidden, context)
        return hidden, self.encoded_lengths(feature_lengths)

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the heads; the first is the default."""
        return tuple(head.name for head in self.output_heads)

    def head(self, name: str | None = None) -> Head:
        """Returns a head by its name, the default head without one.

        Raises:
            MpqError: The model has no such head.
        """
        for head in self.output_heads:
            if name in (None, head.name):
                return head
        raise MpqError(f"head: expected {' or '.join(self.heads)}, which this model has, got {name!r}")

    def searching(self, method: str, name: str | None = None) -> Head:
        """Returns the head that a search belongs to: the first that has it, unless a name chooses the head.

        Args:
            method: The method of a `DecodeOptions`.
            name: One of `heads`.

        Raises:
            MpqError: The model has no such head, or no head with this search.
        """
        among = self.output_heads if name is None else (self.head(name),)
        for head in among:
            if method in head.searches:
                return head
        known = ", ".join(f"{head.name} ({' or '.join(head.searches)})" for head in among)
        raise MpqError(f"decode: {method} search needs a head that this model does not have; it has {known}")

    @torch.no_grad()
    def output_context(self, features: Tensor, feature_lengths: Tensor) -> OutputContext:
        """Returns the contexts of the encoder and all heads.

        A head that needs tokens is given those that the model itself recognises, by greedy search of its default head:
        no transcripts are needed.

        Args:
            features, feature_lengths: (N, T, F) and (N,) valid frames.
        """
        context = self.context(feature_lengths, features.shape[1])
        lengths, heads = self.encoded_lengths(feature_lengths), self.output_heads
        frames = int(self.encoded_lengths(feature_lengths.new_tensor(features.shape[1])))
        if any(head.needs_tokens for head in heads):
            tokens = self.head().recognised(*self.encode(features, feature_lengths))
        else:
            tokens = Targets.of([[] for _ in features], least=0).to(features.device)
        contexts = {head: head.context(lengths, frames, tokens) for head in heads}
        valid = torch.arange(frames, device=lengths.device) < lengths[:, None]  # (N, T')
        return OutputContext(
            {"encoder": context} | {head.name: own.inputs for head, own in contexts.items()},
            {"encoder": valid} | {head.output: own.rows for head, own in contexts.items()},
        )

    def ctc_log_probs(self, encoded: Tensor) -> Tensor:
        """Returns (N, T', V) natural-log probabilities of the tokens and the blank.

        Raises:
            MpqError: The model has no CTC head.
        """
        head = self.head("ctc")
        return head.log_probs(head.logits(encoded, None))

    def attention_logits(self, prefixes: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """Returns the (N, U + 1, V) logits of the tokens after each of (N, U + 1), <sos> first.

        Raises:
            MpqError: The model has no attention head.
        """
        head = self.head("attention")
        lengths = torch.full_like(encoded_lengths, prefixes.shape[1] - 1)
        context = head.context(encoded_lengths, encoded.shape[1], Targets(prefixes[:, 1:], lengths))
        return head.logits(encoded, context.inputs)

    @torch.no_grad()
    def greedy(self, encoded: Tensor, encoded_lengths: Tensor, head: str | None = None) -> list[list[int]]:
        """Returns the token ids that greedy search finds, without blanks and repeats of frames.

        Args:
            encoded, encoded_lengths: (N, T', D), (N,) as `encode` returned them.
            head: One of `heads`; None for the default.

        Raises:
            MpqError: The model has no such head.
        """
        return self.head(head).search(encoded, encoded_lengths)

    @torch.inference_mode()
    def transcribe(
        self, waveforms: Tensor, waveform_lengths: Tensor, options: DecodeOptions = GREEDY, head: str | None = None
    ) -> list[str]:
        """Returns the transcripts of (N, S) waveforms, right-padded, with (N,) lengths in samples.

        Args:
            waveforms, waveform_lengths: The (N, S) samples and (N,) lengths, as `features` takes them.
            options: The search; greedy by default.
            head: One of `heads`; None for the first that has the search.

        Raises:
            MpqError: The model has no such head, or no head with this search.
        """
        searching = self.searching(options.method, head)
        found = searching.search(*self.encode(*self.features(waveforms, waveform_lengths)), options)
        return [self.tokenizer.decode(tokens) for tokens in found]

    def weights(self) -> list[WeightRef]:
        """Returns the quantizable tensors in the model's order: every kernel, matrix and table, wherever it lives.

        Biases, norms and the attention's position biases (vectors for each head) are not quantized.
        """
        found = []
        for module_name, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if kind := _kind(module, name):
                    full_name = f"{module_name}.{name}" if module_name else name
                    found.append(WeightRef(full_name, kind, tuple(parameter.shape), parameter.numel()))
                else:
                    vector = parameter.ndim < 2 or name in ("pos_bias_u", "pos_bias_v")
                    assert vector, f"{module_name}.{name}: a matrix that `weights` does not know how to quantize"
        return found

    def parameter_counts(self) -> dict[str, int]:
        """Returns {"total", "encoder_blocks"}, BatchNorm running mean and variance included (as Li et al. 2023)."""
        tensors = dict(self.named_parameters()) | {
            name: buffer for name, buffer in self.named_buffers() if name.endswith(("running_mean", "running_var"))
        }
        blocks = [tensor.numel() for name, tensor in tensors.items() if name.startswith("encoder.layers.")]
        return {"total": sum(tensor.numel() for tensor in tensors.values()), "encoder_blocks": sum(blocks)}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies tensors into the model, which must have exactly these names and shapes.

    Raises:
        MpqError: Names the first tensors that are missing, superfluous, misshapen or not finite.
    """
    own = model.state_dict()
    faults = [f"tensor {name} is missing" for name in own if name not in state and not is_counter(name)]
    faults += [
        f"tensor {name} {tuple(state[name].shape)} has no place in the model" for name in state if name not in own
    ]
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            faults.append(f"tensor {name}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        elif name in own and own[name].is_floating_point() != tensor.is_floating_point():
            faults.append(f"tensor {name}: expected {own[name].dtype}, got {tensor.dtype}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            faults.append(f"tensor {name} has values that are not finite")
    if faults:
        more = f" (and {len(faults) - 3} more faults)" if len(faults) > 3 else ""
        raise MpqError(f"{'; '.join(faults[:3])}{more}")
    model.load_state_dict(state, strict=False)  # strict but for the counters, as just checked


def is_counter(name: str) -> bool:
    """Returns whether a tensor is one of BatchNorm's counters, which nothing reads and no file needs."""
    return name.endswith("num_batches_tracked")


def _kind(module: nn.Module, name: str) -> str | None:
    """Returns the kind of weight that the parameter `name` of `module` is; None when it is not one."""
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return "packed_projection"
    if isinstance(module, nn.LSTM | nn.GRU) and name.startswith("weight_"):
        return "recurrent"
    if name != "weight":
        return None
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    for dimensions, convolution in ((1, nn.Conv1d), (2, nn.Conv2d)):
        if isinstance(module, convolution):
            depthwise = module.groups > 1 and module.groups == module.in_channels
            return f"conv{dimensions}d_depthwise" if depthwise else f"conv{dimensions}d"
    return None
