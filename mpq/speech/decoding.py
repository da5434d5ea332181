"""From CTC posteriors, and an attention decoder where there is one, to tokens.

CTC gives each frame a distribution over the tokens and a blank; a path picks one class a frame, and a label sequence
is a path with its repeats merged and its blanks dropped, so that many paths (alignments) spell one sequence. Greedy
decoding takes the best path. The prefix beam search takes the best *sequence*: it reads frame by frame, keeps the
likeliest prefixes, and sums the paths of each. The joint search reads token by token as the attention decoder does,
and weighs the decoder's opinion of the next token with the probability that CTC sees a sequence that starts so; CTC's
monotonic alignment keeps the decoder from skipping and looping.

All probabilities are natural logarithms, summed in float64. Scores that agree to nine decimals are a tie, so that
rounding noise, which changes with the shape of a batch, decides nothing: hypotheses do not depend on the other
utterances or on the padding. torchaudio's CTC decoder is not used: it needs the compiled flashlight-text, and it has
no joint search.

Legend: N utterances, T encoder frames, V classes (the tokens and the blank), U tokens, K beam_size, C candidates,
B live hypotheses of all utterances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from mpq.errors import MpqError

_TIE_DECIMALS = 9
"""Scores are equal when they are after rounding to so many decimals; float64 noise is below 1e-10 at a score of 1e4."""
_CHUNK = 2**22
"""Elements of one temporary tensor of prefix scores (32 MiB)."""
_INF = float("inf")

METHODS = ("greedy", "prefix", "joint")
NextLogProbs = Callable[[Tensor, Tensor], Tensor]
"""(prefixes (B, U), utterances (B,)) -> (B, V): see `joint_beam`."""


@dataclass(frozen=True)
class DecodeOptions:
    """How transcripts are searched for.

    Attributes:
        method: "greedy", "prefix" or "joint".
        beam_size: K.
        ctc_weight: Of "joint".
        length_bonus: Of "joint", nats for each token.
        candidates: C of the two beam searches.
    """

    method: str = "greedy"
    beam_size: int = 10
    ctc_weight: float = 0.3
    length_bonus: float = 0.0
    candidates: int = 40

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MpqError(f"decode: method: expected {', '.join(METHODS)}, got {self.method!r}")
        if self.beam_size < 1 or self.candidates < 1:
            raise MpqError(f"decode: beam_size: expected 1 or more, got {min(self.beam_size, self.candidates)}")
        if not math.isfinite(self.length_bonus):
            raise MpqError(f"decode: length_bonus: expected a finite number, got {self.length_bonus}")
        if not 0 <= self.ctc_weight <= 1:
            raise MpqError(f"decode: ctc_weight: expected 0 to 1, got {self.ctc_weight}")


GREEDY = DecodeOptions()


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence that a search found.

    Attributes:
        tokens: Ids without blank, <sos> and <eos>.
        score: Natural logarithm.
    """

    tokens: tuple[int, ...]
    score: float


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
    _check_options(beam_size, candidates)
    frames = _certain_blanks(log_probs, lengths, blank_id)  # (N, T, V)
    size, _, classes = frames.shape
    device = frames.device
    prefixes = torch.full((size, beam_size, 1), -1, device=device)  # (N, K, longest + 1), -1 behind the last token
    prefix_lengths = torch.zeros(size, beam_size, dtype=torch.long, device=device)
    last = torch.full((size, beam_size), blank_id, device=device)  # the blank stands for "none"
    blank = torch.full((size, beam_size), -_INF, dtype=torch.float64, device=device)
    blank[:, 0] = 0.0  # the empty prefix, before any frame
    nonblank = torch.full_like(blank, -_INF)
    everything = torch.arange(classes, device=device).expand(size, classes)
    for frame in frames.unbind(1):  # (N, V)
        total = torch.logaddexp(blank, nonblank)
        stay_blank = total + frame[:, blank_id, None]
        stay_nonblank = nonblank + frame.gather(1, last)
        frame = frame.index_fill(1, torch.tensor([blank_id], device=device), -_INF)
        tokens = everything if candidates is None else _largest(frame, candidates)  # (N, C)
        width = tokens.shape[1]
        repeats = tokens[:, None] == last[:, :, None]
        extend = torch.where(repeats, blank[:, :, None], total[:, :, None]) + frame.gather(1, tokens)[:, None]
        extend = extend.flatten(1)  # (N, K * C)

        # Where slot j holds slot i's prefix and one token more, that extension of i is the same sequence as j. A slot
        # of probability 0 is empty, whatever prefix was left there.
        parents = prefixes.scatter(2, (prefix_lengths[:, :, None] - 1).clamp(min=0), -1)
        is_child = (parents[:, :, None] == prefixes[:, None]).all(-1)  # (N, K of j, K of i)
        alive = total > -_INF
        is_child &= (prefix_lengths > 0)[:, :, None] & alive[:, :, None] & alive[:, None]
        column = torch.full((size, classes), -1, device=device)
        column = column.scatter(1, tokens, everything[:, :width]).gather(1, last)
        merges = is_child.any(-1) & (column >= 0)  # (N, K of j)
        position = (is_child.to(torch.uint8).argmax(-1) * width + column).clamp(min=0)
        merged = extend.gather(1, position).masked_fill(~merges, -_INF)
        stay_nonblank = torch.logaddexp(stay_nonblank, merged)
        extend[merges.nonzero()[:, 0], position[merges]] = -_INF

        values = torch.cat([torch.logaddexp(stay_blank, stay_nonblank), extend], dim=1)
        picks = _largest(values, beam_size)  # (N, K)
        is_new = picks >= beam_size
        source = torch.where(is_new, (picks - beam_size).div(width, rounding_mode="floor"), picks)
        token = tokens.gather(1, (picks - beam_size).clamp(min=0) % width)
        blank = stay_blank.gather(1, source).masked_fill(is_new, -_INF)
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
        _best([Hypothesis(tuple(p[:length]), s) for p, length, s in zip(*beam, strict=True) if s > -_INF], beam_size)
        for beam in found
    ]


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
    _check_options(beam_size, candidates)
    if not 0 <= ctc_weight <= 1 or (max_length is not None and max_length < 0):
        raise MpqError(
            f"expected ctc_weight within 0..1 and max_length of 0 or more, got {ctc_weight} and {max_length}"
        )
    use_ctc, use_attention = ctc_weight > 0, ctc_weight < 1
    if not use_ctc:
        log_probs = torch.zeros_like(log_probs)
    by_class = _certain_blanks(log_probs, lengths, eos_id).mT.contiguous()  # (N, V, T)
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
            following = _check_probs(next_log_probs(prefixes, utterance).to(by_class), (len(utterance), classes))
        else:
            following = torch.zeros(len(utterance), classes, dtype=torch.float64, device=device)
        tokens = torch.arange(classes, device=device).expand(len(utterance), classes)  # (B, C)
        if candidates is not None and use_attention:
            tokens = _largest(following.masked_fill(tokens == eos_id, -_INF), candidates)
        ctc = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
        if use_ctc:
            ctc = _prefix_scores(by_class, utterance, total, blank, prefixes[:, -1], tokens)
        if candidates is not None and not use_attention:
            tokens = _largest(ctc.masked_fill(tokens == eos_id, -_INF), candidates)
            ctc = ctc.gather(1, tokens)
        attended = attention[:, None] + following  # (B, V)
        extend = combine(ctc, attended.gather(1, tokens), length + 1)
        extend = extend.masked_fill((tokens == eos_id) | (length >= limits[utterance])[:, None], -_INF)
        end = combine(total[:, -1], attended[:, eos_id], length)

        width = tokens.shape[1] + 1  # column 0 ends the hypothesis
        scores = torch.full((size, beam_size, width), -_INF, dtype=torch.float64, device=device)
        scores[utterance, slot] = torch.cat([end[:, None], extend], dim=1)
        row = torch.zeros(size, beam_size, dtype=torch.long, device=device)
        row[utterance, slot] = torch.arange(len(utterance), device=device)
        picks = _largest(scores.flatten(1), beam_size)  # (N, K)
        picked = scores.flatten(1).gather(1, picks)
        row, column = row.gather(1, picks.div(width, rounding_mode="floor")), picks % width
        ends = (column == 0) & (picked > -_INF)
        for index, parent, score in zip(
            ends.nonzero()[:, 0].tolist(), prefixes[row[ends], 1:].tolist(), picked[ends].tolist(), strict=True
        ):
            finished[index].append(Hypothesis(tuple(parent), score))

        lives = (column > 0) & (picked > -_INF)
        bounds = picked.masked_fill(~lives, -_INF).amax(1) + max(length_bonus, 0.0) * (limits - length - 1)
        is_open = [
            len(done) < beam_size or _best(done, beam_size)[-1].score < bound + 10**-_TIE_DECIMALS
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
    return [_best(done, beam_size) for done in finished]


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
    for chunk in rows.split(max(1, _CHUNK // max(1, tokens.shape[1] * by_class.shape[2]))):
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
    nonblanks = [torch.full_like(start[:, 0], -_INF)]
    blanks = nonblanks.copy()
    for starts, token_now, blank_now in zip(start.T, token.T.contiguous(), blank.T.contiguous(), strict=False):
        blanks.append(torch.logaddexp(nonblanks[-1], blanks[-1]) + blank_now)
        nonblanks.append(torch.logaddexp(nonblanks[-1], starts) + token_now)
    ended_blank = torch.stack(blanks, dim=1)
    return torch.logaddexp(torch.stack(nonblanks, dim=1), ended_blank), ended_blank


def _largest(values: Tensor, number: int) -> Tensor:
    """Returns the indices of the largest values of each row, ascending: (..., M) -> (..., min(number, M)).

    Ties go to the lower index, on every device (torch.topk does not promise which it takes).
    """
    number = min(number, values.shape[-1])
    values = values.round(decimals=_TIE_DECIMALS)
    smallest = values.topk(number).values[..., -1:]
    larger, equal = values > smallest, values == smallest
    keep = larger | (equal & (equal.cumsum(-1) <= number - larger.sum(-1, keepdim=True)))
    return keep.nonzero()[:, -1].view(*values.shape[:-1], number)


def _best(hypotheses: list[Hypothesis], number: int) -> list[Hypothesis]:
    """Returns the best hypotheses, ties ordered by their tokens; the empty one with -inf if there is none."""
    ranked = sorted(hypotheses, key=lambda each: (-round(each.score, _TIE_DECIMALS), each.tokens))
    return ranked[:number] or [Hypothesis((), -_INF)]


def _certain_blanks(log_probs: Tensor, lengths: Tensor, blank_id: int) -> Tensor:
    """Returns (N, T, V) in float64 with a certain blank in each frame past the length, which adds nothing to a path."""
    shape = tuple(log_probs.shape)
    if log_probs.ndim != 3 or tuple(lengths.shape) != shape[:1] or not 0 <= blank_id < shape[2]:
        raise MpqError(
            "expected (N, T, V) log probabilities, (N,) lengths and a blank id below V, "
            f"got {shape}, {tuple(lengths.shape)} and {blank_id}"
        )
    if ((lengths < 0) | (lengths > shape[1])).any():
        raise MpqError(f"expected lengths within 0..{shape[1]} frames, got {lengths.tolist()}")
    is_past = torch.arange(shape[1], device=log_probs.device) >= lengths.to(log_probs.device)[:, None]  # (N, T)
    frames = log_probs.double().masked_fill(is_past[:, :, None], -_INF)  # (N, T, V)
    frames[:, :, blank_id].masked_fill_(is_past, 0.0)
    return _check_probs(frames, shape)


def _check_probs(log_probs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the log probabilities, which must have this shape and hold numbers, or -inf."""
    if tuple(log_probs.shape) != shape or not (log_probs < _INF).all():
        raise MpqError(
            f"expected {shape} log probabilities without NaN or +inf, got {tuple(log_probs.shape)} with "
            f"{int((~(log_probs < _INF)).sum())} such values: the model's output is not finite"
        )
    return log_probs


def _check_options(beam_size: int, candidates: int | None) -> None:
    if beam_size < 1 or (candidates is not None and candidates < 1):
        raise MpqError(f"expected beam_size and candidates of at least 1, got {beam_size} and {candidates}")
