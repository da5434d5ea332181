"""Calibration audio, and what the layers see of it: the Gram matrix of each layer's inputs, for
`mpq.quantization.gptq`.

For a layer y = W x that is the sum of x x' over all frames (a convolution: over all positions, x the patch that one
output reads). Utterances go through the model one by one, so that no padding is seen; an attention decoder is given the
tokens that the model itself recognises. Weights are found where they are used, not by module: whatever linear map or
convolution reads a weight's memory counts as its use (but torch.nn.MultiheadAttention, whose inner calls cannot be
watched; no model that mpq reads has it).

The matrices take 4 bytes x (columns squared) a layer (a depthwise kernel: for each channel): 152 MB for NVIDIA's 13 M
Conformer, all of them in memory at once. They are kept in the cache folder ($MPQ_CACHE, or ~/.cache/mpq) under the
fingerprints of model and audio, so that packing finds what measuring collected; of more than CACHE_BYTES the files that
were not used for longest go.

Legend: N utterances, T feature frames, F features, B Gram matrices, M positions, K columns (inputs of one output).
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.models.base import AsrModel, WeightRef
from mpq.progress import progress
from mpq.sensitivity.divergence import SegmentTree
from mpq.speech.audio import pad_batch
from mpq.speech.data import batches, calibration_subset, prepare_data, read_batch
from mpq.speech.manifests import Utterance

BATCH_SECONDS = 40.0
"""Padded audio in a batch of calibration data."""
CALIBRATION_SECONDS = 300.0
"""Audio that statistics are collected from, unless another length is asked for."""
HELD_OUT_SECONDS = 300.0
"""Audio that the divergence of a whole model is measured on, and as much that decides on moves."""
CACHE_BYTES = 4 * 2**30
"""Of all files in the cache folder."""


@dataclass(frozen=True)
class CalibrationData:
    """The audio that a model is looked at with.

    Attributes:
        path: The manifest or directory.
        max_seconds, seed: How it was drawn (`mpq.speech.data.calibration_subset`); max_seconds None is all.
        channel, skip_bad: As in `mpq.speech.data.prepare_data`.
        utterances, durations: What was drawn; seconds.
        rest, rest_durations: What was not.
        skipped: Faulty utterances that were left out.
        waveforms: ((1, S) samples, (1,) length) of each utterance.
        sha256: Of the waveforms.
    """

    path: Path
    max_seconds: float | None
    seed: int
    channel: str
    skip_bad: bool
    utterances: tuple[Utterance, ...]
    durations: tuple[float, ...]
    rest: tuple[Utterance, ...]
    rest_durations: tuple[float, ...]
    skipped: int
    waveforms: tuple[tuple[Tensor, Tensor], ...]
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Returns the "data" object of a sensitivity file, from which `redraw` finds the same audio."""
        return {
            "path": str(self.path),
            "utterances": len(self.utterances),
            "seconds": round(sum(self.durations), 3),
            "max_seconds": self.max_seconds,
            "seed": self.seed,
            "channel": self.channel,
            "skip_bad": self.skip_bad,
            "skipped": self.skipped,
            "left_seconds": round(sum(self.rest_durations), 3),
            "sha256": self.sha256,
        }


def unseen(
    model: AsrModel, path: Path, seed: int = 0, channel: str = "error", skip_bad: bool = False
) -> CalibrationData:
    """Returns the data of a file with nothing drawn from them yet.

    Raises:
        MpqError: Bad data, all of its faults at once.
    """
    checked = prepare_data(path, model, channel=channel, skip_bad=skip_bad)
    return CalibrationData(
        path=path,
        max_seconds=None,
        seed=seed,
        channel=channel,
        skip_bad=skip_bad,
        utterances=(),
        durations=(),
        rest=checked.utterances,
        rest_durations=checked.durations,
        skipped=checked.skipped,
        waveforms=(),
        sha256="",
    )


def draw(
    model: AsrModel,
    path: Path,
    max_seconds: float | None,
    seed: int = 0,
    channel: str = "error",
    skip_bad: bool = False,
) -> CalibrationData:
    """Returns a random part of the data, at most `max_seconds` of audio (None: all), and what is left.

    Raises:
        MpqError: Bad data, all of its faults at once.
    """
    return further(model, unseen(model, path, seed, channel, skip_bad), max_seconds)


def further(model: AsrModel, data: CalibrationData, max_seconds: float | None) -> CalibrationData:
    """Returns a random part of what `data` left of its file: audio that it does not have. Nothing left gives nothing.

    Args:
        model: As in `draw`.
        data: What was drawn before.
        max_seconds: As in `draw`.
    """
    utterances, durations = calibration_subset(data.rest, data.rest_durations, max_seconds, data.seed)
    drawn = {utterance.utt_id for utterance in utterances}
    rest = [pair for pair in zip(data.rest, data.rest_durations, strict=True) if pair[0].utt_id not in drawn]
    waveforms = tuple(read_batch([utterance], model.sample_rate, data.channel) for utterance in utterances)
    digest = hashlib.sha256()
    for samples, lengths in waveforms:
        digest.update(lengths.numpy().tobytes())
        digest.update(samples.numpy().tobytes())
    return replace(
        data,
        max_seconds=max_seconds,
        utterances=tuple(utterances),
        durations=tuple(durations),
        rest=tuple(utterance for utterance, _ in rest),
        rest_durations=tuple(seconds for _, seconds in rest),
        waveforms=waveforms,
        sha256=digest.hexdigest(),
    )


def redraw(model: AsrModel, data: dict[str, Any], path: Path | None = None) -> CalibrationData:
    """Returns the audio that the "data" object of a sensitivity or allocation file says.

    Args:
        model: As in `draw`.
        data: As `CalibrationData.to_json` wrote it.
        path: Where the data are now, if not where they were.

    Raises:
        MpqError: The object does not say how the audio was drawn, or what is drawn now is other audio.
    """
    missing = [key for key in ("path", "max_seconds", "seed", "channel", "skip_bad", "sha256") if key not in data]
    if missing:
        raise MpqError(
            f"the sensitivities do not say which audio they were measured on (their data has no {missing[0]!r}); "
            "measure them again"
        )
    where = path or Path(str(data["path"]))
    try:
        drawn = draw(model, where, data["max_seconds"], data["seed"], data["channel"], data["skip_bad"])
    except TypeError as error:
        raise MpqError(
            f"the sensitivities do not say how to draw the audio that they were measured on: {error}"
        ) from None
    if drawn.sha256 != data["sha256"]:
        raise MpqError(
            f"{where}: not the audio that the sensitivities were measured with (it changed since, or is other data); "
            "give that data with --data, or measure again"
        )
    return drawn


def one_by_one(model: AsrModel, data: CalibrationData) -> list[tuple[Tensor, Tensor]]:
    """Returns ((1, T, F) features, (1,) frames) of each utterance, on the model's device."""
    where = next(model.parameters()).device
    with torch.no_grad():  # not inference mode: what a backward pass is to go through
        found = [model.features(samples.to(where), lengths.to(where)) for samples, lengths in data.waveforms]
    return [(features[:, : int(lengths)], lengths) for features, lengths in found]  # some features end with padding


def in_batches(model: AsrModel, data: CalibrationData, max_seconds: float) -> list[tuple[Tensor, Tensor]]:
    """Returns ((N, T, F) features, (N,) frames) of batches of at most `max_seconds`, on the model's device."""
    where = next(model.parameters()).device
    waveforms = {utterance.utt_id: pair for utterance, pair in zip(data.utterances, data.waveforms, strict=True)}
    found = []
    for batch in batches(data.utterances, data.durations, max_seconds):
        samples, lengths = pad_batch([waveforms[utterance.utt_id][0][0] for utterance in batch])
        with torch.no_grad():
            found.append(model.features(samples.to(where), lengths.to(where)))
    return found


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
        on_utterance: Told 1 with each finished utterance.
    """
    watch, tree = _Watch(model, model.weights()), SegmentTree(model)
    path = tree.path(*tree.recognition)
    with torch.no_grad():
        for features, lengths in data:
            context, _ = model.output_context(features, lengths)
            with watch:
                tree.run({0: features}, path, context, keep=())
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
    return unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # (groups, N L, C K' / groups)


def _embedding_patches(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.eye(weight.shape[1], device=weight.device)[None]


_PATCHES = {
    F.linear: _linear_patches,
    F.conv1d: _convolution_patches,
    F.conv2d: _convolution_patches,
    F.embedding: _embedding_patches,
}


def statistics(
    model: AsrModel, model_sha256: str, data: CalibrationData, weight_format: WeightFormat, quiet: bool = True
) -> dict[str, Tensor]:
    """Returns what a rounding needs to know of the layers' inputs: `input_grams` for "gptq", nothing for "nearest".

    It is taken from the cache folder, or collected and put there. A cache that cannot be written is not used, which is
    said on stderr.

    Args:
        model: The float model.
        model_sha256: Of its checkpoint.
        data: The audio.
        weight_format: Names the rounding.
        quiet: Show no progress.
    """
    if weight_format.spec.rounding == "nearest":
        return {}
    if (found := cached_statistics(model, model_sha256, data.sha256)) is not None:
        return found
    with progress("statistics", len(data.utterances), quiet, "utterances") as advance:
        grams = input_grams(model, one_by_one(model, data), advance)
    path = _cache_path(model, model_sha256, data.sha256)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(grams, temporary)
        _prune(path.parent, keep=path)
    except (OSError, SafetensorError, MpqError) as error:
        print(f"mpq: the statistics were not cached: {error}", file=sys.stderr)
    return grams


def cached_statistics(model: AsrModel, model_sha256: str, data_sha256: str) -> dict[str, Tensor] | None:
    """Returns what `statistics` left in the cache folder for a model and audio, None if it is not there."""
    path = _cache_path(model, model_sha256, data_sha256)
    try:
        grams = load_file(path)
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):
        os.utime(path)  # the last use, for `_prune`
    columns = {ref.name: ref.numel // ref.shape[0] for ref in model.weights()}
    fits = all(gram.ndim == 3 and gram.shape[1] == gram.shape[2] == columns.get(name) for name, gram in grams.items())
    return grams if fits else None


def cache_folder() -> Path:
    """Returns the folder for statistics: $MPQ_CACHE, $XDG_CACHE_HOME/mpq or ~/.cache/mpq."""
    if folder := os.environ.get("MPQ_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mpq"


def _cache_path(model: AsrModel, model_sha256: str, data_sha256: str) -> Path:
    kind = "grams/2 decoder" if model.decoder_segments else "grams/2"
    key = hashlib.sha256(f"{kind} {model_sha256} {data_sha256}".encode()).hexdigest()
    return cache_folder() / f"grams-{key[:32]}.safetensors"


def _prune(folder: Path, keep: Path) -> None:
    """Removes the files that were not used for longest, until the rest takes CACHE_BYTES at most."""
    found = []
    for path in folder.glob("grams-*.safetensors"):
        with suppress(FileNotFoundError):  # another process may have removed it
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > CACHE_BYTES and path != keep:
            path.unlink(missing_ok=True)
