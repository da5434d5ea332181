"""What every step asks of a speech recogniser, whatever framework trained it.

A model is a chain of *segments*: features -> ... -> encoder output -> CTC logits, and from the encoder output a second
chain to the logits of the attention decoder, where there is one. Each segment is a function of the hidden state and
owns the weights whose names start with its prefixes. So a change of one weight leaves everything before its segment as
it was, which is what makes the exact sensitivity cheap, and `encode` is nothing but the chain.

Legend: N utterances, S samples, T feature frames, F features, T' encoder frames, D encoder width, V tokens with blank,
U tokens of a transcript.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.speech.decoding import GREEDY, DecodeOptions, NextLogProbs, ctc_greedy, ctc_prefix_beam, joint_beam
from mpq.speech.features import LogMelOptions
from mpq.speech.text import Tokenizer


@dataclass(frozen=True)
class WeightRef:
    """A quantizable weight tensor.

    Attributes:
        name: Its name in the user's checkpoint and in the model's state dict.
        kind: linear, conv1d, conv1d_depthwise, conv2d, conv2d_depthwise, embedding, or packed_projection (several
            linear maps in one matrix, as torch.nn.MultiheadAttention keeps q, k and v).
        shape: Output channels first.
        numel: Number of weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int


@dataclass(frozen=True)
class Segment:
    """One link of the chain.

    Attributes:
        prefixes: The weights whose names start with one of these are used here and nowhere else.
        run: (hidden, context) -> hidden; context is what `AsrModel.context` or `output_context` returned. The first
            hidden state are the features, the last one logits; those between are the model's own affair.
    """

    prefixes: tuple[str, ...]
    run: Callable[[Any, Any], Any]


class AsrModel(nn.Module, ABC):
    """A trained recogniser with a CTC output, in eval mode."""

    family: str
    """Where the checkpoint comes from: "nemo", ..."""
    architecture: str
    """A name such as "conformer-ctc"."""
    sample_rate: int
    """Hz."""
    min_samples: int
    """The shortest waveform that the model accepts, samples at `sample_rate`."""
    blank_id: int
    tokenizer: Tokenizer
    quantized_bits: dict[str, int]
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
        """The encoder's segments; the CTC head is not among them."""

    @property
    @abstractmethod
    def head(self) -> Segment:
        """(N, T', D) -> (N, T', V) CTC logits."""

    @property
    @abstractmethod
    def decoder_segments(self) -> tuple[Segment, ...]:
        """(N, T', D) -> ... -> (N, U + 1, V) logits of the attention decoder; empty for a model without one."""

    @abstractmethod
    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (N, T, F) features and (N,) valid frames of (N, S) float32 waveforms in [-1, 1)."""

    @abstractmethod
    def feature_lengths(self, waveform_lengths: Tensor) -> Tensor:
        """Returns the (N,) valid feature frames of waveforms of (N,) samples."""

    @abstractmethod
    def context(self, feature_lengths: Tensor, frames: int) -> Any:
        """Returns what the segments need besides the hidden tensor (masks, positions); it depends on no weight.

        Args:
            feature_lengths: (N,) valid feature frames.
            frames: T of the padded features.
        """

    @abstractmethod
    def output_context(self, features: Tensor, feature_lengths: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the context of all segments, the decoder's included, and the (N,) rows of the decoder that count.

        The decoder is given the tokens that the model itself recognises, by greedy CTC: no transcripts are needed. Its
        rows are the U tokens and <eos>. Without a decoder this is `context` and None.

        Args:
            features, feature_lengths: (N, T, F) and (N,) valid frames.
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

    def ctc_log_probs(self, encoded: Tensor) -> Tensor:
        """Returns (N, T', V) natural-log probabilities of the tokens and the blank."""
        return self.head.run(encoded, None).log_softmax(dim=-1)

    @abstractmethod
    def attention_logits(self, prefixes: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """Returns the decoder's (N, U + 1, V) logits of the tokens after each of (N, U + 1), <sos> first.

        A model without `decoder_segments` is not asked.
        """

    @abstractmethod
    def next_token(self, encoded: Tensor, encoded_lengths: Tensor) -> NextLogProbs | None:
        """Returns what `mpq.speech.decoding.joint_beam` asks of the attention decoder; None for a model without one.

        Args:
            encoded, encoded_lengths: (N, T', D), (N,) as `encode` returned them.
        """

    @torch.inference_mode()
    def transcribe(self, waveforms: Tensor, waveform_lengths: Tensor, options: DecodeOptions = GREEDY) -> list[str]:
        """Returns the transcripts of (N, S) waveforms, right-padded, with (N,) lengths in samples (greedy CTC).

        Raises:
            MpqError: A search that needs an attention decoder, and the model has none.
        """
        encoded, lengths = self.encode(*self.features(waveforms, waveform_lengths))
        log_probs = self.ctc_log_probs(encoded)
        if options.method == "greedy":
            found = ctc_greedy(log_probs, lengths, self.blank_id)
        elif options.method == "prefix":
            beams = ctc_prefix_beam(log_probs, lengths, self.blank_id, options.beam_size, options.candidates)
            found = [hypotheses[0].tokens for hypotheses in beams]
        else:
            scorer = self.next_token(encoded, lengths)
            if scorer is None:
                raise MpqError("decode: joint search needs an attention decoder, which this model does not have")
            beams = joint_beam(
                scorer,
                log_probs,
                lengths,
                self.blank_id,
                options.beam_size,
                options.ctc_weight,
                options.length_bonus,
                candidates=options.candidates,
            )
            found = [hypotheses[0].tokens for hypotheses in beams]
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
    """Returns what kind of weight the parameter `name` of `module` is, None when it is not one."""
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return "packed_projection"
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
