"""From CTC posteriors to tokens. Legend: N utterances, T encoder frames, V vocabulary with blank, U tokens."""

import torch
from torch import Tensor


def ctc_greedy(log_probs: Tensor, lengths: Tensor, blank_id: int) -> list[list[int]]:
    """Returns the best path's tokens: argmax a frame, repeats merged, blanks dropped (Graves et al. 2006).

    Args:
        log_probs: (N, T, V).
        lengths: (N,) valid frames; the others are ignored.
        blank_id: Index of the blank in V.

    Returns:
        N lists of token ids.
    """
    paths = log_probs.argmax(dim=-1).cpu()
    return [
        [token for token in torch.unique_consecutive(path[:length]).tolist() if token != blank_id]
        for path, length in zip(paths, lengths.tolist(), strict=True)
    ]
