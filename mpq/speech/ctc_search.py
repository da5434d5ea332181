"""From CTC posteriors to tokens: the best path, and the best label sequences.

CTC gives each frame a distribution over the tokens and a blank; a path picks one class a frame, and a label sequence
is a path with its repeats merged and its blanks dropped, so that many paths (alignments) spell one sequence. Greedy
decoding takes the best path. The prefix beam search takes the best *sequence*: it reads frame by frame, keeps the
likeliest prefixes, and sums the paths of each. torchaudio's CTC decoder is not used: it needs the compiled
flashlight-text.

Legend: N utterances, T encoder frames, V classes (the tokens and the blank), K beam_size, C candidates.
"""

import torch
from torch import Tensor

from mpq.speech.decoding import INF, Hypothesis, best, certain_blanks, check_options, largest


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


@torch.inference_mode()
def ctc_prefix_beam(
    log_probs: Tensor, lengths: Tensor, blank_id: int, beam_size: int = 10, candidates: int | None = None
) -> list[list[Hypothesis]]:
    """Returns the likeliest label sequences by CTC, each summed over the alignments that survived the beam.

    Prefix search (Graves et al. 2006), synchronous with the frames (Hannun et al. 2014, algorithm 1, without a language
    model). A prefix keeps apart the probability of its paths that end in a blank and of those that end in its last
    token, because a token that equals the last one is a new token only after a blank. An extension that spells a
    prefix of the beam is added to it. Ties keep the prefixes of the beam before new ones, then those of the earlier
    slot, then the lower token; the result orders ties by their tokens.

    Args:
        log_probs: (N, T, V) natural logarithms.
        lengths: (N,) valid frames; the others are ignored.
        blank_id: Index of the blank in V.
        beam_size: Prefixes that are kept after a frame.
        candidates: Only so many of a frame's likeliest tokens extend a prefix; None for all.

    Returns:
        For each utterance 1 to beam_size hypotheses, best first; the score is log P(tokens | frames). Where the frames
        allow no sequence at all, the empty one with the score -inf.

    Raises:
        MpqError: An option is out of range, a shape is wrong, or a valid frame has a NaN.
    """
    check_options(beam_size, candidates)
    frames = certain_blanks(log_probs, lengths, blank_id)  # (N, T, V)
    size, _, classes = frames.shape
    device = frames.device
    prefixes = torch.full((size, beam_size, 1), -1, device=device)  # (N, K, longest + 1), -1 behind the last token
    prefix_lengths = torch.zeros(size, beam_size, dtype=torch.long, device=device)
    last = torch.full((size, beam_size), blank_id, device=device)  # the blank stands for "none"
    blank = torch.full((size, beam_size), -INF, dtype=torch.float64, device=device)
    blank[:, 0] = 0.0  # the empty prefix, before any frame
    nonblank = torch.full_like(blank, -INF)
    everything = torch.arange(classes, device=device).expand(size, classes)
    for frame in frames.unbind(1):  # (N, V)
        total = torch.logaddexp(blank, nonblank)
        stay_blank = total + frame[:, blank_id, None]
        stay_nonblank = nonblank + frame.gather(1, last)
        frame = frame.index_fill(1, torch.tensor([blank_id], device=device), -INF)
        tokens = everything if candidates is None else largest(frame, candidates)  # (N, C)
        width = tokens.shape[1]
        repeats = tokens[:, None] == last[:, :, None]
        extend = torch.where(repeats, blank[:, :, None], total[:, :, None]) + frame.gather(1, tokens)[:, None]
        extend = extend.flatten(1)  # (N, K * C)

        # Where slot j holds slot i's prefix and one token more, that extension of i is the same sequence as j. A slot
        # of probability 0 is empty, whatever prefix was left there.
        parents = prefixes.scatter(2, (prefix_lengths[:, :, None] - 1).clamp(min=0), -1)
        is_child = (parents[:, :, None] == prefixes[:, None]).all(-1)  # (N, K of j, K of i)
        alive = total > -INF
        is_child &= (prefix_lengths > 0)[:, :, None] & alive[:, :, None] & alive[:, None]
        column = torch.full((size, classes), -1, device=device)
        column = column.scatter(1, tokens, everything[:, :width]).gather(1, last)
        merges = is_child.any(-1) & (column >= 0)  # (N, K of j)
        position = (is_child.to(torch.uint8).argmax(-1) * width + column).clamp(min=0)
        merged = extend.gather(1, position).masked_fill(~merges, -INF)
        stay_nonblank = torch.logaddexp(stay_nonblank, merged)
        extend[merges.nonzero()[:, 0], position[merges]] = -INF

        values = torch.cat([torch.logaddexp(stay_blank, stay_nonblank), extend], dim=1)
        picks = largest(values, beam_size)  # (N, K)
        is_new = picks >= beam_size
        source = torch.where(is_new, (picks - beam_size).div(width, rounding_mode="floor"), picks)
        token = tokens.gather(1, (picks - beam_size).clamp(min=0) % width)
        blank = stay_blank.gather(1, source).masked_fill(is_new, -INF)
        nonblank = torch.where(is_new, values.gather(1, picks), stay_nonblank.gather(1, source))
        last = torch.where(is_new, token, last.gather(1, source))
        old_lengths = prefix_lengths.gather(1, source)
        prefixes = prefixes.gather(1, source[:, :, None].expand(-1, -1, prefixes.shape[2]))
        end = prefixes.gather(2, old_lengths[:, :, None])
        prefixes.scatter_(2, old_lengths[:, :, None], torch.where(is_new[:, :, None], token[:, :, None], end))
        prefix_lengths = old_lengths + is_new
        if (prefix_lengths == prefixes.shape[2]).any():
            prefixes = torch.nn.functional.pad(prefixes, (0, 1), value=-1)
    found = zip(prefixes.tolist(), prefix_lengths.tolist(), torch.logaddexp(blank, nonblank).tolist(), strict=True)
    return [
        best([Hypothesis(tuple(p[:length]), s) for p, length, s in zip(*beam, strict=True) if s > -INF], beam_size)
        for beam in found
    ]
