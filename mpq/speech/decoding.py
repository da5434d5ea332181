"""The common part of the searches from posteriors to tokens: options, hypotheses, ties and checks.

The searches are `mpq.speech.ctc_search` (greedy and prefix beam) and `mpq.speech.joint_search` (CTC and an attention
decoder together). All probabilities are natural logarithms, summed in float64. Scores that agree to nine decimals are a
tie, so that rounding noise, which changes with the shape of a batch, decides nothing: hypotheses do not depend on the
other utterances or on the padding.

Legend: N utterances, T encoder frames, V classes (the tokens and the blank), M values, K beam_size, C candidates.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from mpq.config.types import DecodeMethod
from mpq.errors import MpqError

TIE_DECIMALS = 9
"""Scores are equal when they are after rounding to so many decimals; float64 noise is below 1e-10 at a score of 1e4."""
INF = float("inf")

METHODS: tuple[str, ...] = get_args(DecodeMethod)


@dataclass(frozen=True)
class DecodeOptions:
    """The options of a search for transcripts.

    Attributes:
        method: "greedy", "prefix" or "joint".
        beam_size: K, the hypotheses that the two beam searches keep.
        ctc_weight: The share of CTC in the scores of the joint search, 0 to 1.
        length_bonus: The bonus that the joint search adds to a score for each token, nats.
        candidates: C, the tokens by which the two beam searches extend a hypothesis.
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
        score: The natural logarithm of its probability, or the weighted score of the joint search.
    """

    tokens: tuple[int, ...]
    score: float


def largest(values: Tensor, number: int) -> Tensor:
    """Returns the indices of the largest values of each row, ascending: (..., M) -> (..., min(number, M)).

    Ties go to the lower index, on every device (torch.topk does not promise which it takes).
    """
    number = min(number, values.shape[-1])
    values = values.round(decimals=TIE_DECIMALS)
    smallest = values.topk(number).values[..., -1:]
    larger, equal = values > smallest, values == smallest
    keep = larger | (equal & (equal.cumsum(-1) <= number - larger.sum(-1, keepdim=True)))
    return keep.nonzero()[:, -1].view(*values.shape[:-1], number)


def best(hypotheses: list[Hypothesis], number: int) -> list[Hypothesis]:
    """Returns the best hypotheses, ties ordered by their tokens; the empty one with -inf if there is none."""
    ranked = sorted(hypotheses, key=lambda each: (-round(each.score, TIE_DECIMALS), each.tokens))
    return ranked[:number] or [Hypothesis((), -INF)]


def certain_blanks(log_probs: Tensor, lengths: Tensor, blank_id: int) -> Tensor:
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
    frames = log_probs.double().masked_fill(is_past[:, :, None], -INF)  # (N, T, V)
    frames[:, :, blank_id].masked_fill_(is_past, 0.0)
    return check_probs(frames, shape)


def check_probs(log_probs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the log probabilities, which must have this shape and hold numbers, or -inf."""
    if tuple(log_probs.shape) != shape or not (log_probs < INF).all():
        raise MpqError(
            f"expected {shape} log probabilities without NaN or +inf, got {tuple(log_probs.shape)} with "
            f"{int((~(log_probs < INF)).sum())} such values: the model's output is not finite"
        )
    return log_probs


def check_options(beam_size: int, candidates: int | None) -> None:
    if beam_size < 1 or (candidates is not None and candidates < 1):
        raise MpqError(f"expected beam_size and candidates of at least 1, got {beam_size} and {candidates}")
