"""What a test set can say about "no worse": how much worse at most, what could have been found, and several tests.

"Not significantly worse" proves little on a small set. So three numbers go with it, from the segments of MAPSSWE (see
`mpq.scoring.significance`). With d = (errors of a) - (errors of b) of n segments and N reference words, b has
S = -sum(d) more errors than a, and a word error rate that is S / N higher.

**The variance of S.** Segments are places where a system went wrong, so their number is a matter of chance, too:
another test set of N words has another n. A sum of n independent terms with mean m and variance s^2, n random, has the
variance E[n] s^2 + Var[n] m^2 (law of total variance). Errors are rare events, Var[n] = E[n] (Poisson), so it is
E[n] (s^2 + m^2), and V = sum d^2 estimates it. MAPSSWE takes n as given and has n s^2: the same where the systems are
about equally good, as its null hypothesis says, and too small where one is clearly worse (where nearly every error is
b's, a bound with it holds 80 % of the time and not 95 %, docs/verdicts.md).

**It grows with the loss.** More errors of b are more segments, so a loss of k errors that is not in the test set would
come with a variance of V + k g, g errors a segment; it is c standard errors away when k = c sqrt(V + k g).
"""

import math
from collections.abc import Sequence

from numpy.typing import ArrayLike
from scipy.stats import norm

from mpq.errors import MpqError
from mpq.scoring.records import NonInferiority
from mpq.scoring.significance import SCTK_ALPHA, differences

BOUND_LEVEL = 0.95
"""The level of the one-sided bound of how much worse b is."""

POWER = 0.8
"""How often a difference is found that counts as detectable: four times in five."""

MARGIN = 0.002
"""The loss that is put up with unless the user says otherwise: 0.2 points of word error rate."""


def non_inferiority(segment_errors: ArrayLike, words: int, margin: float = MARGIN) -> NonInferiority:
    """Returns the one-sided 95 % bound of WER(b) - WER(a), and whether it is below the margin.

    The bound is (S + k) / N with k = 1.645 sqrt(V + k g), g = max(0, sum(-d^3) / V): where chance has shown too little
    of b's losses, it has shown too little of their variance, and sum(-d^3) is the covariance of S and V. For systems
    that are about equally good, g is about 0.

    Args:
        segment_errors: The segments of all utterances, as `mapsswe` takes them.
        words: N, the number of reference words.
        margin: The loss that is put up with, a fraction of a word error rate, 0 or more.

    Returns:
        The verdict; the bound is None, and nothing is shown, where the segments do not vary or there are no words.

    Raises:
        MpqError: A margin out of range, or segments as `mapsswe` refuses them.

    >>> result = non_inferiority([(2, 0), (1, 0), (0, 1), (1, 1)], words=1000, margin=0.003)
    >>> round(result.upper, 5), result.non_inferior     # (-2 + 1.645 * sqrt(6)) / 1000: the losses are a's, g = 0
    (0.00203, True)
    """
    if not 0 <= margin <= 1:
        raise MpqError(f"margin: expected a word error rate from 0 to 1 (0 to 100 points), got {margin!r}")
    values = differences(segment_errors)
    if not _can_tell(values, words):
        return NonInferiority(margin, None, False)
    squares, cubes = math.fsum(d**2 for d in values), math.fsum(d**3 for d in values)
    loss = _loss(float(norm.ppf(BOUND_LEVEL)), squares, max(0.0, -cubes / squares))
    upper = (loss - math.fsum(values)) / words
    return NonInferiority(margin, upper, upper < margin)


def detectable(segment_errors: ArrayLike, words: int, alpha: float = SCTK_ALPHA) -> float | None:
    """Returns the loss that MAPSSWE at level alpha would find four times in five on this test set.

    Let b make k more errors than a, in segments of their own, of as many errors as the segments in which the systems
    differ, g = V / sum |d|. Equally good systems would have the variance V - |S| g. The test finds the loss with
    probability 0.8 when it is c = z(1 - alpha/2) + z(0.8) standard errors, 2.802 at 0.05; the loss is k / N. (Without
    the growth of the variance, c sqrt(V) would be found two times in three, docs/verdicts.md. The chance of a verdict
    in the wrong direction is below 1e-5.)

    Args:
        segment_errors: The segments of all utterances, as `mapsswe` takes them.
        words: N, the number of reference words.
        alpha: The level of the two-sided test.

    Returns:
        A fraction of a word error rate; None where the segments do not vary or there are no words.

    >>> round(detectable([(1, 0), (0, 1)] * 50, words=10_000), 5)    # k = 2.802 * sqrt(100 + k)
    0.00322
    """
    if not 0 < alpha < 1:
        raise MpqError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    values = differences(segment_errors)
    if not _can_tell(values, words):
        return None
    squares, total = math.fsum(d**2 for d in values), math.fsum(values)
    burst = squares / math.fsum(map(abs, values))
    loss = _loss(float(norm.ppf(1 - alpha / 2) + norm.ppf(POWER)), max(0.0, squares - abs(total) * burst), burst)
    return loss / words


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p of each of several tests, adjusted so that all of them together keep their level.

    An adjusted p below alpha rejects; with true hypotheses alone, any rejection has a probability of at most alpha,
    however the tests depend on each other. Source: Holm, Scandinavian Journal of Statistics 6 (1979).

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _can_tell(values: Sequence[float], words: int) -> bool:
    """Returns whether the segments vary, which MAPSSWE needs as well, and there are words to relate them to."""
    return words > 0 and len(set(values)) > 1


def _loss(c: float, variance: float, burst: float) -> float:
    """Returns the k of k = c sqrt(variance + k burst)."""
    half = c * c * burst / 2
    return half + math.sqrt(half * half + c * c * variance)
