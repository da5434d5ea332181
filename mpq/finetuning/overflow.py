"""The first layer of a model whose output is not finite, to tell where a training broke down."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq.models.base import AsrModel
from mpq.sensitivity.divergence import OutputBatch, SegmentTree
from mpq.speech.data import read_batch
from mpq.speech.manifests import Utterance


@torch.no_grad()
def overflow(model: AsrModel, features: Tensor, frames: Tensor) -> str:
    """Returns, as a part of a message, the first layer whose output is not finite; "" if there is none.

    Args:
        model: The model, in eval mode.
        features, frames: (N, T, F) features and (N,) numbers of valid frames.
    """
    tree, batch = SegmentTree(model), OutputBatch(model, features, frames)
    states = tree.run({0: features}, range(len(tree.segments)), batch.context.inputs)
    for index, segment in enumerate(tree.segments):
        *_, hidden = states[index + 1] if isinstance(states[index + 1], tuple) else (states[index + 1],)
        if not hidden.isfinite().all():
            return f" (from the layer {segment.prefixes[0].rstrip('.')} on)"
    return ""


@torch.no_grad()
def overflow_on(utterances: Sequence[Utterance], model: AsrModel, channel: str) -> str:
    """Returns the same part of a message for the first of some utterances that has such an output.

    Args:
        utterances: They are read one after another.
        model: The model, in eval mode.
        channel: The channel to read, such as "error" or "mix" (`mpq.speech.audio.read_audio`).
    """
    device = next(model.parameters()).device
    for item in utterances:
        waveforms, lengths = read_batch([item], model.sample_rate, channel)
        if found := overflow(model, *model.features(waveforms.to(device), lengths.to(device))):
            return found
    return ""
