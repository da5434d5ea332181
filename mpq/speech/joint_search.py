"""From CTC posteriors and an attention decoder to tokens, in one pass.

The search reads token by token as the attention decoder does, and weighs the decoder's opinion of the next token with
the probability that CTC sees a sequence that starts so; CTC's monotonic alignment keeps the decoder from skipping and
looping.

Legend: N utterances, T encoder frames, V classes (the tokens and the blank), U tokens, K beam_size, C candidates,
B live hypotheses of all utterances.
"""

from collections.abc import Callable
from itertools import count

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
            with eos_id (as <sos>), for the (B,) utterances of the batch that they belong to. Not called when
            ctc_weight is 1.
        log_probs: (N, T, V) CTC natural logarithms; only their shape is used when ctc_weight is 0.
        lengths: (N,) valid frames; the others are ignored.
        eos_id: Index of <eos> and <sos> in the decoder's classes and of the blank in CTC's.
        beam_size: Hypotheses that are kept after a step.
        ctc_weight: CTC's share of the score, 0 to 1.
        length_bonus: Added to the score for each token.
        max_length: Tokens at which a hypothesis must end; None for the utterance's frames, since CTC cannot spell
            more tokens than frames.
        candidates: Only so many tokens extend a hypothesis, the decoder's likeliest (CTC's when ctc_weight is 1, which
            saves no time: all have been scored by then); None for all.

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
    use_ctc, use_attention = ctc_weight > 0, ctc_weight < 1
    if not use_ctc:
        log_probs = torch.zeros_like(log_probs)
    by_class = certain_blanks(log_probs, lengths, eos_id).mT.contiguous()  # (N, V, T)
    size, classes = by_class.shape[:2]
    device = by_class.device
    limits = torch.where(lengths > 0, lengths if max_length is None else max_length, 0).to(device)
    finished = [[] if length else [Hypothesis((), 0.0)] for length in lengths.tolist()]

    # The live hypotheses, all of the same length: row b belongs to an utterance and has a slot of its beam.
    utterance = lengths.to(device).nonzero().flatten()  # (B,)
    slot = torch.zeros_like(utterance)
    prefixes = torch.full((len(utterance), 1), eos_id, device=device)  # (B, U + 1)
    attention = torch.zeros(len(utterance), dtype=torch.float64, device=device)  # (B,)
    blank = torch.nn.functional.pad(by_class[utterance, eos_id].cumsum(1), (1, 0))  # (B, T + 1), 0 is before all frames
    total = blank

    def combine(ctc: Tensor, attention: Tensor, tokens: int) -> Tensor:
        score = torch.full_like(attention, length_bonus * tokens)
        if use_ctc:
            score = score + ctc_weight * ctc
        return score + (1 - ctc_weight) * attention if use_attention else score

    for length in count():
        if not len(utterance):
            break
        if use_attention:
            following = check_probs(next_log_probs(prefixes, utterance).to(by_class), (len(utterance), classes))
        else:
            following = torch.zeros(len(utterance), classes, dtype=torch.float64, device=device)
        tokens = torch.arange(classes, device=device).expand(len(utterance), classes)  # (B, C)
        if candidates is not None and use_attention:
            tokens = largest(following.masked_fill(tokens == eos_id, -INF), candidates)
        ctc = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
        if use_ctc:
            ctc = _prefix_scores(by_class, utterance, total, blank, prefixes[:, -1], tokens)
        if candidates is not None and not use_attention:
            tokens = largest(ctc.masked_fill(tokens == eos_id, -INF), candidates)
            ctc = ctc.gather(1, tokens)
        attended = attention[:, None] + following  # (B, V)
        extend = combine(ctc, attended.gather(1, tokens), length + 1)
        extend = extend.masked_fill((tokens == eos_id) | (length >= limits[utterance])[:, None], -INF)
        end = combine(total[:, -1], attended[:, eos_id], length)

        width = tokens.shape[1] + 1  # column 0 ends the hypothesis
        scores = torch.full((size, beam_size, width), -INF, dtype=torch.float64, device=device)
        scores[utterance, slot] = torch.cat([end[:, None], extend], dim=1)
        row = torch.zeros(size, beam_size, dtype=torch.long, device=device)
        row[utterance, slot] = torch.arange(len(utterance), device=device)
        picks = largest(scores.flatten(1), beam_size)  # (N, K)
        picked = scores.flatten(1).gather(1, picks)
        row, column = row.gather(1, picks.div(width, rounding_mode="floor")), picks % width
        ends = (column == 0) & (picked > -INF)
        for index, parent, score in zip(
            ends.nonzero()[:, 0].tolist(), prefixes[row[ends], 1:].tolist(), picked[ends].tolist(), strict=True
        ):
            finished[index].append(Hypothesis(tuple(parent), score))

        lives = (column > 0) & (picked > -INF)
        bounds = picked.masked_fill(~lives, -INF).amax(1) + max(length_bonus, 0.0) * (limits - length - 1)
        is_open = [
            len(done) < beam_size or best(done, beam_size)[-1].score < bound + 10**-TIE_DECIMALS
            for done, bound in zip(finished, bounds.tolist(), strict=True)
        ]
        lives &= torch.tensor(is_open, device=device)[:, None]
        utterance, slot = lives.nonzero(as_tuple=True)
        row = row[lives]
        token = tokens[row, column[lives] - 1]
        attention = attended[row, token]
        if use_ctc:
            repeats = token == prefixes[row, -1]
            start = torch.where(repeats[:, None], blank[row], total[row])
            total, blank = _extend(start, by_class[utterance, token], by_class[utterance, eos_id])
        else:
            total, blank = total[row], blank[row]
        prefixes = torch.cat([prefixes[row], token[:, None]], dim=1)
    return [best(done, beam_size) for done in finished]


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
