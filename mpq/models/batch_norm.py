"""Batch normalisation whose statistics are those of the valid frames of the whole batch.

torch.nn.BatchNorm1d counts padded frames too, so that an utterance's output in training would depend on how long the
others are, and it sees only the utterances of its own process. Here padding does not count and the processes of a
distributed training share their sums, so a batch trains the same however it is padded and shared out. (SyncBatchNorm
has no CPU version and no mask.) Outside training this is BatchNorm1d.

Legend: N utterances, D channels, T' frames.
"""

from typing import cast

import torch
from torch import Tensor, nn


def batch_norm(norm: nn.BatchNorm1d, x: Tensor, valid: Tensor | None) -> Tensor:
    """Returns (N, D, T') normalised over N and T'; in training, `norm`'s running statistics are moved along.

    Args:
        norm: Holds the parameters and the running statistics.
        x: (N, D, T').
        valid: (N, T') bool: the frames that count; None: all.
    """
    if not norm.training:
        return cast(Tensor, norm(x))
    counter, momentum = norm.num_batches_tracked, norm.momentum
    assert norm.running_mean is not None and norm.running_var is not None
    assert counter is not None and momentum is not None, "statistics that are not tracked as running means"
    with torch.autocast(x.device.type, enabled=False):  # sums of half-precision numbers are no statistics
        wide = x.float()
        mask = None if valid is None else valid[:, None].to(wide)  # (N, 1, T')
        count = _shared(wide.new_full((1,), wide.shape[0] * wide.shape[2]) if mask is None else mask.sum()[None])
        mean = _shared(_sum(wide, mask)) / count  # (D,)
        centred = wide - mean[:, None]
        variance = _shared(_sum(centred.square(), mask)) / count
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(unbiased, momentum)
            counter.add_(1)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return (centred * scale[:, None] + norm.bias[:, None]).to(x.dtype)


def _sum(x: Tensor, mask: Tensor | None) -> Tensor:
    return (x if mask is None else x * mask).sum(dim=(0, 2))


def _shared(x: Tensor) -> Tensor:
    """Returns the sum over all processes; gradients pass through it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    from torch.distributed.nn.functional import all_reduce

    return cast(Tensor, all_reduce(x))  # type: ignore[no-untyped-call]  # torch has no types for it
