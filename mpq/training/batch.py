"""A batch as the model in training sees it: features with SpecAugment's masks, and without.

Legend: N utterances, S samples, T feature frames, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq.config import AugmentConfig
from mpq.models.base import AsrModel
from mpq.models.heads import Targets
from mpq.speech.augment import generator, spec_mask
from mpq.speech.manifests import Utterance


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch.

    Attributes:
        features, frames: (N, T, F) features with SpecAugment's masks, and (N,) numbers of valid frames.
        clean: (N, T, F) features without the masks.
        targets: The transcripts' tokens.
        items: The utterances of this process.
        all_indices: The utterances of the whole batch, of every process, as indices into the data.
        update_indices: The utterances of all batches of the update, as indices into the data.
        of: The number of batches of the update.
    """

    features: Tensor
    frames: Tensor
    clean: Tensor
    targets: Targets
    items: Sequence[Utterance]
    all_indices: Sequence[int]
    update_indices: Sequence[int]
    of: int


@torch.no_grad()
def clean_features(model: AsrModel, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (N, T, F) features of (N, S) waveforms, and the (N,) numbers of valid frames, of which T is the largest.

    Args:
        model: The model, which makes the features.
        waveforms, lengths: (N, S) samples and the (N,) numbers of valid ones.
    """
    features, frames = model.features(waveforms, lengths)
    return features[:, : int(frames.max())], frames


def masked_features(
    features: Tensor, frames: Tensor, utt_ids: Sequence[str], bands: int, augment: AugmentConfig, seed: int, epoch: int
) -> Tensor:
    """Returns (N, T, F) features with SpecAugment's masks; the same seed, epoch and utterance give the same masks.

    Args:
        features, frames: (N, T, F) features and (N,) numbers of valid frames.
        utt_ids: The names of the N utterances.
        bands: The number of Mel bands, which are the first of the F features.
        augment: The numbers and widths of the masks.
        seed, epoch: The keys of the random choices, besides the utterance.
    """
    masks = torch.zeros(features.shape, dtype=torch.bool)
    for row, count, utt_id in zip(masks, frames.tolist(), utt_ids, strict=True):
        mask = spec_mask(count, bands, augment, generator(seed, epoch, utt_id, "mask"))
        row[:count, :bands] = mask
        row[:count, bands:] = mask.all(dim=1, keepdim=True)  # pitch has no bands: masked with whole frames
    return features.masked_fill(masks.to(features.device), 0.0)
