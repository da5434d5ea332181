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
    beam = _Beam(frames, blank_id, beam_size, candidates)
    for frame in frames.unbind(1):
        beam.read(frame)
    return beam.hypotheses()


class _Beam:
    """The likeliest prefixes of the utterances of a batch, after the frames that were read; at first the empty ones.

    A slot of probability 0 is empty, whatever prefix was left there.

    Attributes:
        prefixes: (N, K, longest + 1) tokens, -1 behind the last one.
        lengths: (N, K) number of tokens.
        last: (N, K) last tokens; the blank stands for "none".
        blank, nonblank: (N, K) float64 log probabilities of a prefix's paths that end in a blank, and of the others.
    """

    def __init__(self, frames: Tensor, blank_id: int, beam_size: int, candidates: int | None) -> None:
        self.blank_id, self.beam_size, self.candidates = blank_id, beam_size, candidates
        size, _, classes = frames.shape
        device = frames.device
        self.classes = torch.arange(classes, device=device).expand(size, classes)
        self.prefixes = torch.full((size, beam_size, 1), -1, device=device)
        self.lengths = torch.zeros(size, beam_size, dtype=torch.long, device=device)
        self.last = torch.full((size, beam_size), blank_id, device=device)
        self.blank = torch.full((size, beam_size), -INF, dtype=torch.float64, device=device)
        self.blank[:, 0] = 0.0  # the empty prefix, before any frame
        self.nonblank = torch.full_like(self.blank, -INF)

    def read(self, frame: Tensor) -> None:
        """Goes on by one frame of (N, V) log probabilities."""
        total = torch.logaddexp(self.blank, self.nonblank)
        stay_blank = total + frame[:, self.blank_id, None]
        stay_nonblank = self.nonblank + frame.gather(1, self.last)
        frame = frame.index_fill(1, torch.tensor([self.blank_id], device=frame.device), -INF)
        tokens = self.classes if self.candidates is None else largest(frame, self.candidates)  # (N, C)
        repeats = tokens[:, None] == self.last[:, :, None]
        extend = torch.where(repeats, self.blank[:, :, None], total[:, :, None]) + frame.gather(1, tokens)[:, None]
        stay_nonblank, extend = self._merged(stay_nonblank, extend.flatten(1), tokens, total > -INF)
        self._keep(stay_blank, stay_nonblank, extend, tokens)

    def _merged(self, stay: Tensor, extend: Tensor, tokens: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (N, K) and (N, K * C) scores with each extension that spells another slot's prefix added to that one.

        Where slot j holds slot i's prefix and one token more, that extension of i is the same sequence as j.

        Args:
            stay: (N, K) scores of the prefixes without a new token.
            extend: (N, K * C) scores of their extensions.
            tokens: (N, C) tokens that extend them.
            alive: (N, K) bool: the slots that are not empty.
        """
        width = tokens.shape[1]
        parents = self.prefixes.scatter(2, (self.lengths[:, :, None] - 1).clamp(min=0), -1)
        is_child = (parents[:, :, None] == self.prefixes[:, None]).all(-1)  # (N, K of j, K of i)
        is_child &= (self.lengths > 0)[:, :, None] & alive[:, :, None] & alive[:, None]
        column = torch.full_like(self.classes, -1).scatter(1, tokens, self.classes[:, :width]).gather(1, self.last)
        merges = is_child.any(-1) & (column >= 0)  # (N, K of j)
        position = (is_child.to(torch.uint8).argmax(-1) * width + column).clamp(min=0)
        stay = torch.logaddexp(stay, extend.gather(1, position).masked_fill(~merges, -INF))
        extend[merges.nonzero()[:, 0], position[merges]] = -INF
        return stay, extend

    def _keep(self, stay_blank: Tensor, stay_nonblank: Tensor, extend: Tensor, tokens: Tensor) -> None:
        """Keeps the K best of the (N, K) prefixes as they are and of their (N, K * C) extensions."""
        width = tokens.shape[1]
        values = torch.cat([torch.logaddexp(stay_blank, stay_nonblank), extend], dim=1)
        picks = largest(values, self.beam_size)  # (N, K)
        is_new = picks >= self.beam_size
        source = torch.where(is_new, (picks - self.beam_size).div(width, rounding_mode="floor"), picks)
        token = tokens.gather(1, (picks - self.beam_size).clamp(min=0) % width)
        self.blank = stay_blank.gather(1, source).masked_fill(is_new, -INF)
        self.nonblank = torch.where(is_new, values.gather(1, picks), stay_nonblank.gather(1, source))
        self.last = torch.where(is_new, token, self.last.gather(1, source))
        old_lengths = self.lengths.gather(1, source)
        prefixes = self.prefixes.gather(1, source[:, :, None].expand(-1, -1, self.prefixes.shape[2]))
        end = prefixes.gather(2, old_lengths[:, :, None])
        prefixes.scatter_(2, old_lengths[:, :, None], torch.where(is_new[:, :, None], token[:, :, None], end))
        self.lengths = old_lengths + is_new
        is_full = (self.lengths == prefixes.shape[2]).any()
        self.prefixes = torch.nn.functional.pad(prefixes, (0, 1), value=-1) if is_full else prefixes

    def hypotheses(self) -> list[list[Hypothesis]]:
        """Returns the prefixes as hypotheses, best first."""
        scores = torch.logaddexp(self.blank, self.nonblank).tolist()
        found = zip(self.prefixes.tolist(), self.lengths.tolist(), scores, strict=True)
        return [
            best(
                [Hypothesis(tuple(p[:length]), s) for p, length, s in zip(*beam, strict=True) if s > -INF],
                self.beam_size,
            )
            for beam in found
        ]
