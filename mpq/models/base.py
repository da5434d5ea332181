"""What every step asks of a speech recogniser, whatever framework trained it.

A model is a chain of *stages*: features -> ... -> encoder output -> CTC logits. Each stage is a function of the hidden
tensor and owns the weights whose names start with its prefixes. So a change of one weight leaves everything before
its stage as it was, which is what makes the exact sensitivity cheap, and `encode` is nothing but the chain.

Legend: N utterances, S samples, T feature frames, F features, T' encoder frames, D encoder width, V tokens with blank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.decoding import ctc_greedy
from mpq.errors import MpqError
from mpq.text import Tokenizer


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
class Stage:
    """One link of the chain.

    Attributes:
        prefixes: The weights whose names start with one of these are used here and nowhere else.
        run: (hidden, context) -> hidden; context is what `AsrModel.context` returned.
    """

    prefixes: tuple[str, ...]
    run: Callable[[Tensor, Any], Tensor]


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
    stages: tuple[Stage, ...]
    """The encoder's stages; the CTC head is not among them."""
    head: Stage
    """(N, T', D) -> (N, T', V) CTC logits."""
    quantized_bits: dict[str, int]
    """{weight name: bits} of a model that was read from an artifact; empty otherwise."""
    quantized_bytes: dict[str, int]
    """{weight name: bytes in the artifact}; empty otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.quantized_bits, self.quantized_bytes = {}, {}

    @abstractmethod
    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (N, T, F) features and (N,) valid frames of (N, S) float32 waveforms in [-1, 1)."""

    @abstractmethod
    def context(self, feature_lengths: Tensor, frames: int) -> Any:
        """Returns what the stages need besides the hidden tensor (masks, positions); it depends on no weight.

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

    def encode(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (N, T', D) encoder output and its (N,) valid frames for (N, T, F) features."""
        context = self.context(feature_lengths, features.shape[1])
        hidden = features
        for stage in self.stages:
            hidden = stage.run(hidden, context)
        return hidden, self.encoded_lengths(feature_lengths)

    def ctc_log_probs(self, encoded: Tensor) -> Tensor:
        """Returns (N, T', V) natural-log probabilities of the tokens and the blank."""
        return self.head.run(encoded, None).log_softmax(dim=-1)

    @torch.inference_mode()
    def transcribe(self, waveforms: Tensor, waveform_lengths: Tensor) -> list[str]:
        """Returns the greedy CTC transcripts of (N, S) waveforms, right-padded, with (N,) lengths in samples."""
        encoded, lengths = self.encode(*self.features(waveforms, waveform_lengths))
        return [
            self.tokenizer.decode(tokens) for tokens in ctc_greedy(self.ctc_log_probs(encoded), lengths, self.blank_id)
        ]

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
