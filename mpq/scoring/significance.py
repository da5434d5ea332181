"""Is the difference between two recognisers real? NIST's matched pairs test and its companions, as pure functions.

The chain is `align` -> `segments` -> `mapsswe`: words are aligned as sclite does it, the two alignments of an utterance
are cut into segments that may be taken as independent, and the mean difference of errors per segment is tested.
Everything follows NIST SCTK (commit 9688a268: sclite 2.10, sc_stats 1.3), whose numbers it reproduces.
The idea is Gillick and Cox's (ICASSP 1989); where the two could differ, SCTK is followed. Sign and Wilcoxon tests over
speakers are not offered: sc_stats pairs speakers by order of appearance, not by name.

An alignment is a string over C (correct), S (substitution), D (deletion) and I (insertion), one letter an event, in
order; it has as many letters other than I as the reference has words.

A direction trap: differences are (errors of a) - (errors of b), so a negative mean or z means that a is better.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from mpq.errors import MpqError
from mpq.scoring.records import MapssweResult

SUBSTITUTION_COST, GAP_COST = 4, 3
"""sclite's costs of a substitution, and of an insertion or a deletion."""

BUFFER_WORDS = 2
"""Consecutive good words that end a segment; hard-wired in sc_stats."""

SCTK_ALPHA, SCTK_CRITICAL_Z = 0.05, 1.960
"""The only level that sc_stats knows, and its critical value (the exact one is 1.95996...)."""

SCTK_TABLE_Z = [{10: 0.0999999, 99: 0.9899999}.get(k, k / 100) for k in range(515)]
"""Abscissae of sc_stats's table of the normal distribution (SCTK, statdist.c); two of them are not round there."""

FEW_SEGMENTS = 30
"""Below this many segments the normal approximation of the mean is doubtful."""

BLOCK_DRAWS = 1 << 22
"""Utterances that `bootstrap` draws at a time: bounds its memory, does not change its result."""


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> str:
    """Returns the alignment that sclite finds, such as "CCSCI".

    Dynamic programming from the start, costs 0 (correct), 4 (substitution), 3 (insertion, deletion), traced back from
    the end; equal costs are decided for the diagonal, then the insertion, then the deletion. Source: SCTK's aligner,
    the tie order found by experiment against it.

    Unlike Levenshtein, two substitutions lose to a deletion and an insertion around a match, so the number of errors
    can be above the edit distance that jiwer counts (seen only at high error rates).

    Args:
        reference: Words, compared for equality as they are.
        hypothesis: Words.

    >>> align("the quick fox saw".split(), "quick dog saw us".split())
    'DCSCI'
    """
    n, m = len(reference), len(hypothesis)
    # An equal last pair is always a diagonal step: one word more or less changes the cost of the rest by 3 at most.
    # (An equal first pair is not: "a" against "a a" is "IC".)
    while n and m and reference[n - 1] == hypothesis[m - 1]:
        n, m = n - 1, m - 1
    suffix = len(reference) - n

    above = [GAP_COST * j for j in range(m + 1)]
    moves = []
    for i in range(n):
        word, diagonal = reference[i], above[0]
        best = GAP_COST * (i + 1)
        row, letters = [best], []
        for j in range(m):
            is_correct = word == hypothesis[j]
            if not is_correct:
                diagonal += SUBSTITUTION_COST
            deletion = above[j + 1] + GAP_COST
            insertion = best + GAP_COST
            if diagonal <= deletion and diagonal <= insertion:
                best = diagonal
                letters.append("C" if is_correct else "S")
            elif deletion < insertion:
                best = deletion
                letters.append("D")
            else:
                best = insertion
                letters.append("I")
            row.append(best)
            diagonal = above[j + 1]
        above = row
        moves.append("".join(letters))

    backwards = []
    while n and m:
        letter = moves[n - 1][m - 1]
        backwards.append(letter)
        n, m = n - (letter != "I"), m - (letter != "D")
    return "D" * n + "I" * m + "".join(reversed(backwards)) + "C" * suffix


def count_errors(alignment: str) -> int:
    """Returns the number of substitutions, deletions and insertions."""
    return len(alignment) - alignment.count("C")


def segments(alignment_a: str, alignment_b: str) -> list[tuple[int, int]]:
    """Returns the segments of one utterance as (errors of a, errors of b), in order; each has at least one error.

    A segment opens at the first error of either system and closes as soon as two consecutive reference words are
    correct in both systems without an insertion in front of either, or at the end of the utterance. Insertions belong
    to the gap in front of the next reference word. Source: sc_stats -t mapsswe (minimum buffer of 2 words).

    Args:
        alignment_a: The alignment of system a, as from `align`.
        alignment_b: The alignment of system b, over the same reference words.

    Raises:
        MpqError: The strings are no alignments, or those of references of different length.

    >>> segments("CCSCCSCCCC", "CCCCCCCCCC"), segments("CCSCSCCCCC", "CCCCCCCCCC")
    ([(1, 0), (1, 0)], [(2, 0)])
    """
    (gaps_a, words_a), (gaps_b, words_b) = _gaps_and_words(alignment_a), _gaps_and_words(alignment_b)
    if len(words_a) != len(words_b):
        raise MpqError(
            f"segments: expected alignments over the same reference words, got {len(words_a)} in {alignment_a!r} and "
            f"{len(words_b)} in {alignment_b!r}"
        )
    found = []
    errors_a = errors_b = good_words = 0
    # The last gap has no word after it; "C" there can close nothing that the end of the utterance does not close.
    for gap_a, gap_b, word_a, word_b in zip(gaps_a, gaps_b, words_a + "C", words_b + "C", strict=True):
        if gap_a or gap_b:
            errors_a, errors_b, good_words = errors_a + gap_a, errors_b + gap_b, 0
        if word_a == word_b == "C":
            good_words += 1
            if good_words == BUFFER_WORDS and (errors_a or errors_b):
                found.append((errors_a, errors_b))
                errors_a = errors_b = 0
        else:
            errors_a, errors_b, good_words = errors_a + (word_a != "C"), errors_b + (word_b != "C"), 0
    if errors_a or errors_b:
        found.append((errors_a, errors_b))
    return found


def mapsswe(segment_errors: ArrayLike, alpha: float = SCTK_ALPHA) -> MapssweResult:
    """Returns the matched pairs sentence-segment word error test (MAPSSWE) of two systems.

    With d the differences (errors of a) - (errors of b) of n segments, z = mean(d) / (std(d) / sqrt(n)) is compared
    with the normal distribution, two-tailed. The verdict is that of sc_stats: |z| > 1.960, strictly, at alpha 0.05.
    `p` is exact; `p_sctk` is what sc_stats prints (z floored to 0.01, 2e-7 from |z| = 5.14), so near 0.05 p and the
    verdict can disagree: p of |z| = 1.9599... is below 0.05, and not significant. Source: sc_stats -t mapsswe.

    Args:
        segment_errors: The segments of all utterances: (n, 2) with rows (errors of a, errors of b), as `segments` gives
            them for one utterance; or (n,) differences. n may be 0.
        alpha: The level of the test, between 0 and 1.

    Returns:
        The result; `note` says when the test is undefined (no segments, where sc_stats crashes; all differences equal,
        for which z is 0 and p is 1 as in sc_stats) or doubtful (fewer than 30 segments).

    Raises:
        MpqError: Another shape, a value that is not finite, or alpha out of range.

    >>> result = mapsswe([(2, 0), (1, 0), (0, 1), (3, 1)])   # four segments, errors of a and of b
    >>> result.mean, round(result.z, 3), result.significant, result.better
    (1.0, 1.414, False, None)
    """
    _check_alpha(alpha)
    critical_z = SCTK_CRITICAL_Z if alpha == SCTK_ALPHA else -NormalDist().inv_cdf(alpha / 2)
    values = differences(segment_errors)
    n = len(values)
    if n == 0:
        return MapssweResult(0, 0.0, 0.0, None, None, None, False, None, "no errors in either system: nothing to test")

    # The order of operations is sc_stats's, to the last bit; from Python 3.12 on, sum() would round differently.
    total = squares = 0.0
    for difference in values:
        total += difference
    mean = total / n
    for difference in values:
        squares += (difference - mean) * (difference - mean)
    variance = squares / (n - 1) if squares else 0.0
    std = math.sqrt(variance)
    z = mean / (std / math.sqrt(n)) if variance else 0.0

    notes = []
    if not variance:
        what = f"all {n} segments differ by {mean:+g} errors" if n > 1 else f"one segment, difference {mean:+g}"
        notes.append(f"{what}: variance 0, the test is undefined (z = 0 as in sc_stats says nothing about the systems)")
    if n < FEW_SEGMENTS:
        notes.append(f"only {n} segments: below {FEW_SEGMENTS} the normal approximation is doubtful")
    is_significant = abs(z) > critical_z
    return MapssweResult(
        segments=n,
        mean=mean,
        std=std,
        z=z,
        p=_two_tailed_p(z),
        p_sctk=_p_of_sctk(z),
        significant=is_significant,
        better=("a" if mean < 0 else "b") if is_significant else None,
        note="; ".join(notes),
    )


def differences(segment_errors: ArrayLike) -> list[float]:
    """Returns (errors of a) - (errors of b) of each segment.

    Args:
        segment_errors: As `mapsswe` takes them.

    Raises:
        MpqError: Another shape, or a value that is not finite.
    """
    try:
        values = np.asarray(segment_errors, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MpqError(
            f"mapsswe: expected pairs of numbers (errors of a, errors of b), or differences: {error}"
        ) from None
    if values.ndim == 2 and values.shape[1] == 2:
        values = values[:, 0] - values[:, 1]
    if values.ndim != 1:
        raise MpqError(f"mapsswe: expected segments of shape (n, 2) or differences of shape (n,), got {values.shape}")
    if not np.isfinite(values).all():
        raise MpqError("mapsswe: expected finite numbers of errors, got NaN or infinity")
    return [float(value) for value in values]


def mcnemar(a_only_wrong: int, b_only_wrong: int, alpha: float = SCTK_ALPHA) -> dict[str, Any]:
    """Returns McNemar's test on utterances: {"a_only_wrong", "b_only_wrong", "p", "significant"}.

    An utterance is wrong when it has an error. p is the exact two-tailed binomial probability, significant below
    alpha. Unlike sc_stats, whose normal approximation for more than 20 discordant utterances is wrong (it halves a
    count: 19 against 21 gives p = 0.0009, SCTK pull request 46), exact for every count.

    Args:
        a_only_wrong: Utterances that a has wrong and b has right.
        b_only_wrong: Utterances that b has wrong and a has right.
        alpha: The level of the test.

    >>> mcnemar(9, 2)["p"]
    0.0654296875
    """
    _check_alpha(alpha)
    n = a_only_wrong + b_only_wrong
    p = float(binomtest(a_only_wrong, n, 0.5).pvalue) if n else 1.0
    return {"a_only_wrong": a_only_wrong, "b_only_wrong": b_only_wrong, "p": p, "significant": p < alpha}


def bootstrap(
    errors_a: Sequence[int],
    errors_b: Sequence[int],
    words: Sequence[int],
    alpha: float = SCTK_ALPHA,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the interval of WER(b) - WER(a): {"difference", "low", "high", "level", "resamples", "seed"}.

    Utterances are drawn with replacement, the same ones for both systems; low and high are the alpha/2 and 1 - alpha/2
    quantiles over the resamples. Exchanging a and b mirrors the interval. Utterances are taken as independent; where
    those of one speaker go wrong together, the true interval is wider. Source: Bisani and Ney (ICASSP 2004), as told
    in arXiv:1912.09508, section 1.

    Args:
        errors_a: Word errors of a in each utterance, shape (N,), N >= 1.
        errors_b: Word errors of b in each utterance, shape (N,).
        words: Reference words of each utterance, shape (N,). The WER of a resample without words is 0.
        alpha: 1 - the level of the interval.
        resamples: The number of resamples.
        seed: The seed of the random numbers; the same seed gives the same interval.

    Raises:
        MpqError: No utterances, lists of different length, or an option out of range.
    """
    _check_alpha(alpha)
    if resamples < 1:
        raise MpqError(f"resamples: expected 1 or more, got {resamples}")
    if seed < 0:
        raise MpqError(f"seed: expected 0 or more, got {seed}")
    if not len(words) == len(errors_a) == len(errors_b) or not len(words):
        raise MpqError(
            f"bootstrap: expected three lists of the same length, 1 or more; got {len(errors_a)} errors of a, "
            f"{len(errors_b)} of b and {len(words)} numbers of words"
        )
    counts = np.asarray(words, dtype=np.int64)
    differences = np.asarray(errors_b, dtype=np.int64) - np.asarray(errors_a, dtype=np.int64)
    random = np.random.default_rng(seed)
    utterances = len(counts)
    block = max(1, BLOCK_DRAWS // utterances)
    resampled = []
    for start in range(0, resamples, block):
        picks = random.integers(utterances, size=(min(block, resamples - start), utterances))
        resampled.append(_rates(differences[picks].sum(1), counts[picks].sum(1)))
    low, high = np.quantile(np.concatenate(resampled), [alpha / 2, 1 - alpha / 2])
    return {
        "difference": float(_rates(differences.sum(keepdims=True), counts.sum(keepdims=True))[0]),
        "low": float(low),
        "high": float(high),
        "level": 1 - alpha,
        "resamples": resamples,
        "seed": seed,
    }


def _gaps_and_words(alignment: str) -> tuple[list[int], str]:
    """Returns the insertions in front of each reference word and after the last, and the letters of the words."""
    if alignment.strip("CSDI"):
        raise MpqError(f"alignment: expected a string over C, S, D and I, got {alignment!r}")
    return [len(gap) for gap in re.split("[CSD]", alignment)], alignment.replace("I", "")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise MpqError(f"alpha: expected a number between 0 and 1, got {alpha!r}")


def _two_tailed_p(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _p_of_sctk(z: float) -> float:
    """Returns the p that sc_stats looks up: that of the table's last abscissa at or below |z| (0, 0.01, ... 5.14).

    Found by comparing as sc_stats does; floor(100 * z) would round some products across a step (0.29 * 100 < 29).
    """
    entry = bisect_right(SCTK_TABLE_Z, abs(z)) - 1
    return 2e-7 if entry == len(SCTK_TABLE_Z) - 1 else _two_tailed_p(entry / 100)


def _rates(errors: NDArray[np.int64], words: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(errors, words, out=np.zeros(len(words)), where=words > 0)
