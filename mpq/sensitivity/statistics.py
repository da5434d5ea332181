"""The statistics of calibration audio: the Gram matrix of each layer's inputs, for `mpq.quantization.gptq`.

For a layer y = W x that is the sum of x x' over all frames (for a convolution: over all positions, where x is the patch
that one output reads). Utterances go through the model one by one, so that no padding is seen; a head that needs tokens
is given those that the model itself recognises. Weights are found where they are used, not by module: whatever linear
map or convolution reads a weight's memory counts as its use. The inner calls of torch.nn.MultiheadAttention and of
torch.nn.LSTM cannot be watched; no model that mpq reads has them.

The matrices take 4 bytes x (columns squared) a layer (a depthwise kernel: for each channel): 152 MB for NVIDIA's 13 M
Conformer, all of them in memory at once. They are kept in the cache folder ($MPQ_CACHE, or ~/.cache/mpq) under the
fingerprints of model and audio, so that packing finds those that measuring collected. Where they exceed CACHE_BYTES,
those that were not used for longest are removed.

Legend: T feature frames, F features, B Gram matrices, M positions, K columns (inputs of one output).
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpq.artifact.parts import version_of
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.identity import cache_folder
from mpq.models.base import AsrModel, WeightRef
from mpq.progress import progress
from mpq.runtime import one_thread
from mpq.sensitivity.calibration import CalibrationData, one_by_one
from mpq.sensitivity.divergence import SegmentTree

_log = logging.getLogger(__name__)

CACHE_BYTES = 4 * 2**30
"""The most that the cache folder keeps."""


def input_grams(
    model: AsrModel,
    data: Sequence[tuple[Tensor, Tensor]],
    on_utterance: Callable[[float], None] = lambda amount: None,
) -> dict[str, Tensor]:
    """Returns {weight name: (B, K, K) float32 sum of the outer products of its inputs}, on the CPU.

    B is 1 but for grouped convolutions, which have one matrix a group. An embedding's row is read as it is, so that
    its matrix is a multiple of the identity. A weight that the data never reach is missing from the result.

    Args:
        model: The float model.
        data: ((1, T, F) features, (1,) frames) of each utterance.
        on_utterance: Called with 1 for each finished utterance.
    """
    watch, tree = _Watch(model, model.weights()), SegmentTree(model)
    path = tree.path(*tree.recognition)
    with torch.no_grad():
        for features, lengths in data:
            inputs = model.output_context(features, lengths).inputs
            with watch:
                tree.run({0: features}, path, inputs, keep=())
            on_utterance(1)
    return {name: gram.cpu() for name, gram in watch.grams.items()}


class _Watch(TorchFunctionMode):
    """Adds up the Gram matrices of whatever reads the given weights while it is on."""

    def __init__(self, model: AsrModel, refs: Sequence[WeightRef]) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        self.names = {parameters[ref.name].untyped_storage().data_ptr(): ref.name for ref in refs}
        self.grams: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _PATCHES:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.names.get(weight.untyped_storage().data_ptr())
            if name is not None:
                patches = _PATCHES[func](*args, **kwargs)  # (B, M, K)
                gram = patches.transpose(1, 2) @ patches
                self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        return result


def _linear_patches(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.reshape(1, -1, input.shape[-1])


def _convolution_patches(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if weight.ndim == 3:  # over time alone: the same over an image one row high
        (stride,), (padding,), (dilation,) = (v if isinstance(v, tuple) else (v,) for v in (stride, padding, dilation))
        input, weight = input[:, :, None], weight[:, :, None]
        stride, padding, dilation = (1, stride), (0, padding), (1, dilation)
    unfolded = F.unfold(input, weight.shape[2:], dilation, padding, stride)  # (N, C K', L)
    grouped = unfolded.reshape(len(unfolded), groups, -1, unfolded.shape[2])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)  # (groups, N L, C K' / groups)


def _embedding_patches(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.eye(weight.shape[1], device=weight.device)[None]


_PATCHES = {
    F.linear: _linear_patches,
    F.conv1d: _convolution_patches,
    F.conv2d: _convolution_patches,
    F.embedding: _embedding_patches,
}


def input_statistics(
    model: AsrModel,
    model_sha256: str,
    data: CalibrationData,
    weight_format: WeightFormat,
    quiet: bool = True,
    cache_bytes: float = CACHE_BYTES,
) -> dict[str, Tensor]:
    """Returns the statistics that the rounding needs: `input_grams` for "gptq", none for "nearest".

    The statistics are taken from the cache folder, or collected and put there. Where the cache cannot be written, a
    warning is logged.

    Args:
        model: The float model, as it is stored (`mpq.artifact.parts.fold_as_stored`).
        model_sha256: The model's fingerprint.
        data: The audio.
        weight_format: The quantizer, which names the rounding.
        quiet: Show no progress.
        cache_bytes: The most that the cache folder keeps.
    """
    if not weight_format.spec.needs_statistics:
        return {}
    if (found := cached_statistics(model, model_sha256, data.sha256, weight_format)) is not None:
        return found
    # one thread, so that what is rounded by them is the same for any number
    with progress("statistics", len(data.utterances), quiet, "utterances") as advance, one_thread():
        grams = input_grams(model, one_by_one(model, data), advance)
    path = _cache_path(model, model_sha256, data.sha256, weight_format)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(grams, temporary)
        _prune(path.parent, path, cache_bytes)
    except (OSError, SafetensorError, MpqError) as error:
        _log.warning("the statistics were not cached: %s", error)
    return grams


def cached_statistics(
    model: AsrModel, model_sha256: str, data_sha256: str, weight_format: WeightFormat
) -> dict[str, Tensor] | None:
    """Returns the statistics of a model and audio that the cache folder has; None if it has none."""
    path = _cache_path(model, model_sha256, data_sha256, weight_format)
    try:
        grams = load_file(path)
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):
        os.utime(path)  # the last use, for `_prune`
    columns = {ref.name: ref.numel // ref.shape[0] for ref in model.weights()}
    fits = all(gram.ndim == 3 and gram.shape[1] == gram.shape[2] == columns.get(name) for name, gram in grams.items())
    return grams if fits else None


def _cache_path(model: AsrModel, model_sha256: str, data_sha256: str, weight_format: WeightFormat) -> Path:
    told = [head.output for head in model.output_heads if head.needs_tokens]  # statistics depend on the tokens, too
    folded = ["folded"] if version_of(weight_format) == 2 else []
    kind = " ".join(["grams/2", *folded, *told])
    key = hashlib.sha256(f"{kind} {model_sha256} {data_sha256}".encode()).hexdigest()
    return cache_folder() / f"grams-{key[:32]}.safetensors"


def _prune(folder: Path, keep: Path, most_bytes: float) -> None:
    """Removes the files that were not used for longest, but `keep`, until the rest takes `most_bytes` at most."""
    found = []
    for path in folder.glob("grams-*.safetensors"):
        with suppress(FileNotFoundError):  # another process may have removed it
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > most_bytes and path != keep:
            path.unlink(missing_ok=True)
