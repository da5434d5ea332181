"""From CTC posteriors and an attention decoder to tokens, in one pass.

The search reads token by token as the attention decoder does, and weighs the decoder's opinion of the next token with
the probability that CTC sees a sequence that starts so; CTC's monotonic alignment keeps the decoder from skipping and
looping.

Legend: N utterances, T encoder frames, V classes (the tokens and the blank), U tokens, K beam_size, C candidates,
B live hypotheses of all utterances.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.speech.decoding import (
    INF,
    TIE_DECIMALS,
    Hypothesis,
    best,
    certain_blanks,
    check_options,
    check_probs,
    largest,
)

_CHUNK = 2**22
"""Elements of one temporary tensor of prefix scores (32 MiB)."""

NextLogProbs = Callable[[Tensor, Tensor], Tensor]
"""(prefixes (B, U), utterances (B,)) -> (B, V): see `joint_beam`."""


@torch.inference_mode()
def joint_beam(
    next_log_probs: NextLogProbs,
    log_probs: Tensor,
    lengths: Tensor,
    eos_id: int,
    beam_size: int = 10,
    ctc_weight: float = 0.3,
    length_bonus: float = 0.0,
    max_length: int | None = None,
    candidates: int | None = None,
    blank_id: int | None = None,
) -> list[list[Hypothesis]]:
    """Returns the best label sequences by CTC and the attention decoder together, found in one pass.

    One-pass joint decoding (Hori et al. 2017; Watanabe et al. 2017): all hypotheses grow by one token a step. A
    finished one has the score

        ctc_weight * log P_ctc(tokens) + (1 - ctc_weight) * log P_att(tokens, <eos>) + length_bonus * U

    and a partial one has the CTC prefix score in place of log P_ctc: the probability of all sequences that start with
    it. Unlike the papers, which finish every hypothesis at every length, ending competes with the other tokens for a
    place in the beam, so that a beam of 1 is greedy; and the search of an utterance ends when no live hypothesis can
    reach its beam_size finished ones, rather than by a threshold. Ties go to the tokens that sort first.

    Args:
        next_log_probs: Gives the (B, V) natural-log probabilities of the token after (B, U + 1) prefixes, which start
            with eos_id (as <sos>), for the (B,) utterances that they belong to. Not called when ctc_weight is 1.
        log_probs: (N, T, V) CTC natural logarithms; only their shape is used when ctc_weight is 0.
        lengths: (N,) valid frames; the others are ignored.
        eos_id: Index of <eos> and <sos> in the decoder's classes.
        beam_size: Hypotheses that are kept after a step.
        ctc_weight: CTC's share of the score, 0 to 1.
        length_bonus: Added to the score for each token.
        max_length: Tokens at which a hypothesis must end; None: as many as the utterance has frames.
        candidates: Only so many tokens extend a hypothesis: the decoder's likeliest, or CTC's when ctc_weight is 1;
            None for all.
        blank_id: Index of the blank in CTC's classes; None: that of <eos>.

    Returns:
        For each utterance 1 to beam_size finished hypotheses, best first. An utterance without frames has the empty
        one with the score 0 (the decoder is not asked about it); where no hypothesis could end with a probability
        above 0, the empty one with the score -inf.

    Raises:
        MpqError: An option is out of range, a shape is wrong, or there is a NaN among the probabilities.
    """
    check_options(beam_size, candidates)
    if not 0 <= ctc_weight <= 1 or (max_length is not None and max_length < 0):
        raise MpqError(
            f"expected ctc_weight within 0..1 and max_length of 0 or more, got {ctc_weight} and {max_length}"
        )
    log_probs = log_probs if ctc_weight else torch.zeros_like(log_probs)
    blank_id = eos_id if blank_id is None else blank_id
    by_class = certain_blanks(log_probs, lengths, blank_id).mT.contiguous()  # (N, V, T)
    limits = torch.where(lengths > 0, lengths if max_length is None else max_length, 0).to(by_class.device)
    ends = (eos_id, blank_id)
    beam = _Beam(next_log_probs, by_class, lengths, limits, ends, beam_size, ctc_weight, length_bonus, candidates)
    while len(beam.utterance):
        beam.grow()
    return [best(done, beam_size) for done in beam.finished]


class _Beam:
    """The hypotheses of a joint search: finished ones, and live ones, which are all of the same length.

    Row b of the live ones belongs to an utterance and has a slot of its beam.

    Args:
        next_log_probs: As in `joint_beam`.
        by_class: (N, V, T) CTC log probabilities.
        lengths: (N,) valid frames.
        limits: (N,) tokens at which a hypothesis must end.
        ends: eos_id and blank_id, as in `joint_beam`; neither is a token.
        beam_size, ctc_weight, length_bonus, candidates: As in `joint_beam`.
    """

    def __init__(
        self,
        next_log_probs: NextLogProbs,
        by_class: Tensor,
        lengths: Tensor,
        limits: Tensor,
        ends: tuple[int, int],
        beam_size: int,
        ctc_weight: float,
        length_bonus: float,
        candidates: int | None,
    ) -> None:
        self.next_log_probs, self.by_class, self.limits = next_log_probs, by_class, limits
        self.eos_id, self.blank_id = ends
        self.beam_size, self.candidates = beam_size, candidates
        self.ctc_weight, self.length_bonus = ctc_weight, length_bonus
        self.use_ctc, self.use_attention = ctc_weight > 0, ctc_weight < 1
        device = by_class.device
        self.finished = [[] if length else [Hypothesis((), 0.0)] for length in lengths.tolist()]
        self.utterance = lengths.to(device).nonzero().flatten()  # (B,)
        self.slot = torch.zeros_like(self.utterance)
        self.prefixes = torch.full((len(self.utterance), 1), self.eos_id, device=device)  # (B, U + 1)
        self.attention = torch.zeros(len(self.utterance), dtype=torch.float64, device=device)  # (B,)
        blanks = by_class[self.utterance, self.blank_id].cumsum(1)
        self.blank = torch.nn.functional.pad(blanks, (1, 0))  # (B, T + 1), 0 is before all frames
        self.total = self.blank

    def grow(self) -> None:
        """Ends the live hypotheses, or extends them by one token."""
        length = self.prefixes.shape[1] - 1
        tokens, ctc, attended = self._scored()
        extend = self._combined(ctc, attended.gather(1, tokens), length + 1)
        extend = extend.masked_fill(self._is_no_token(tokens) | (length >= self.limits[self.utterance])[:, None], -INF)
        end = self._combined(self.total[:, -1], attended[:, self.eos_id], length)
        row, column, picked = self._picked(torch.cat([end[:, None], extend], dim=1))  # column 0 ends the hypothesis
        ends = (column == 0) & (picked > -INF)
        for index, parent, score in zip(
            ends.nonzero()[:, 0].tolist(), self.prefixes[row[ends], 1:].tolist(), picked[ends].tolist(), strict=True
        ):
            self.finished[index].append(Hypothesis(tuple(parent), score))
        lives = (column > 0) & (picked > -INF)
        bounds = picked.masked_fill(~lives, -INF).amax(1) + max(self.length_bonus, 0.0) * (self.limits - length - 1)
        lives &= self._is_open(bounds)[:, None]
        self.utterance, self.slot = lives.nonzero(as_tuple=True)
        row = row[lives]
        self._extend_by(row, tokens[row, column[lives] - 1], attended)

    def _scored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (B, C) next tokens, their (B, C) CTC prefix scores and the decoder's (B, V) scores of all classes."""
        by_class, live, classes = self.by_class, len(self.utterance), self.by_class.shape[1]
        if self.use_attention:
            following = check_probs(self.next_log_probs(self.prefixes, self.utterance).to(by_class), (live, classes))
        else:
            following = torch.zeros(live, classes, dtype=torch.float64, device=by_class.device)
        tokens = torch.arange(classes, device=by_class.device).expand(live, classes)
        if self.candidates is not None and self.use_attention:
            tokens = largest(following.masked_fill(self._is_no_token(tokens), -INF), self.candidates)
        ctc = torch.zeros(tokens.shape, dtype=torch.float64, device=by_class.device)
        if self.use_ctc:
            ctc = _prefix_scores(by_class, self.utterance, self.total, self.blank, self.prefixes[:, -1], tokens)
        if self.candidates is not None and not self.use_attention:
            tokens = largest(ctc.masked_fill(self._is_no_token(tokens), -INF), self.candidates)
            ctc = ctc.gather(1, tokens)
        return tokens, ctc, self.attention[:, None] + following

    def _is_no_token(self, classes: Tensor) -> Tensor:
        return (classes == self.eos_id) | (classes == self.blank_id)

    def _combined(self, ctc: Tensor, attention: Tensor, tokens: int) -> Tensor:
        """Returns the scores of hypotheses of so many tokens."""
        score = torch.full_like(attention, self.length_bonus * tokens)
        if self.use_ctc:
            score = score + self.ctc_weight * ctc
        return score + (1 - self.ctc_weight) * attention if self.use_attention else score

    def _picked(self, extensions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (N, K) rows, columns and values of the best of the (B, C + 1) scores for each utterance."""
        shape = len(self.limits), self.beam_size
        scores = torch.full((*shape, extensions.shape[1]), -INF, dtype=torch.float64, device=extensions.device)
        scores[self.utterance, self.slot] = extensions
        row = torch.zeros(shape, dtype=torch.long, device=extensions.device)
        row[self.utterance, self.slot] = torch.arange(len(self.utterance), device=extensions.device)
        picks = largest(scores.flatten(1), self.beam_size)
        slots = picks.div(extensions.shape[1], rounding_mode="floor")
        return row.gather(1, slots), picks % extensions.shape[1], scores.flatten(1).gather(1, picks)

    def _is_open(self, bounds: Tensor) -> Tensor:
        """Returns (N,) bool: whether a live hypothesis, which reaches `bounds` at most, may still be among the best."""
        is_open = [
            len(done) < self.beam_size or best(done, self.beam_size)[-1].score < bound + 10**-TIE_DECIMALS
            for done, bound in zip(self.finished, bounds.tolist(), strict=True)
        ]
        return torch.tensor(is_open, device=bounds.device)

    def _extend_by(self, row: Tensor, token: Tensor, attended: Tensor) -> None:
        """Makes the live hypotheses those of some (B',) rows, each with a (B',) token more."""
        self.attention = attended[row, token]
        if self.use_ctc:
            repeats = token == self.prefixes[row, -1]
            start = torch.where(repeats[:, None], self.blank[row], self.total[row])
            of_token, of_blank = self.by_class[self.utterance, token], self.by_class[self.utterance, self.blank_id]
            self.total, self.blank = _extend(start, of_token, of_blank)
        else:
            self.total, self.blank = self.total[row], self.blank[row]
        self.prefixes = torch.cat([self.prefixes[row], token[:, None]], dim=1)


def _prefix_scores(
    by_class: Tensor, utterance: Tensor, total: Tensor, blank: Tensor, last: Tensor, tokens: Tensor
) -> Tensor:
    """Returns (B, C) log probabilities that CTC's label sequence starts with a hypothesis and one token more.

    psi of algorithm 2 of Watanabe et al. 2017: a sum over the frame t in which the new token starts, of the paths that
    spell the hypothesis before t (only those that end in a blank if the token repeats the last one) times p_t(token).

    Args:
        by_class: (N, V, T) CTC log probabilities.
        utterance: (B,) the hypotheses' utterances.
        total: (B, T + 1) log probability of the paths of the first t frames that spell the hypothesis.
        blank: (B, T + 1) of those among them that end in a blank.
        last: (B,) last tokens.
        tokens: (B, C) next tokens.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    scores = []
    for chunk in torch.split(rows, max(1, _CHUNK // max(1, tokens.shape[1] * by_class.shape[2]))):
        repeats = (tokens[chunk] == last[chunk, None])[:, :, None]
        before = torch.where(repeats, blank[chunk, None, :-1], total[chunk, None, :-1])
        scores.append((before + by_class[utterance[chunk, None], tokens[chunk]]).logsumexp(-1))
    return torch.cat(scores)


def _extend(start: Tensor, token: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `total` and `blank` of `_prefix_scores` for hypotheses that grew by a token.

    The recursion over the frames of algorithm 2 of Watanabe et al. 2017.

    Args:
        start: (B, T + 1) log probability of the paths of the first t frames after which the token may start (phi).
        token: (B, T) CTC log probabilities of the token.
        blank: (B, T) of the blank.
    """
    nonblanks = [torch.full_like(start[:, 0], -INF)]
    blanks = nonblanks.copy()
    for starts, token_now, blank_now in zip(start.T, token.T.contiguous(), blank.T.contiguous(), strict=False):
        blanks.append(torch.logaddexp(nonblanks[-1], blanks[-1]) + blank_now)
        nonblanks.append(torch.logaddexp(nonblanks[-1], starts) + token_now)
    ended_blank = torch.stack(blanks, dim=1)
    return torch.logaddexp(torch.stack(nonblanks, dim=1), ended_blank), ended_blank
