"""What a test set can show: hand-computed values, properties, simulated pairs with known differences, brute force."""

import itertools
import math

import numpy as np
import pytest
from tiny_pairs import Pair

from mpq.errors import MpqError
from mpq.scoring.significance import mapsswe
from mpq.scoring.verdicts import detectable, holm, non_inferiority

SEGMENTS = [(1, 0)] * 40 + [(0, 1)] * 50 + [(0, 3)] * 2 + [(1, 1)] * 30


def test_the_bound_by_hand() -> None:
    # b has 50 + 6 - 40 = 16 errors more, sum d^2 = 40 + 50 + 18 = 108, sum -d^3 = 50 + 54 - 40 = 64
    found = non_inferiority(SEGMENTS, words=10_000, margin=0.004)
    k = 10_000 * found.upper - 16  # 17.916; without the growth of the variance 17.094
    assert k == pytest.approx(1.6448536 * math.sqrt(108 + k * 64 / 108), rel=1e-7)
    assert found.non_inferior and found.margin == 0.004
    assert not non_inferiority(SEGMENTS, words=10_000, margin=0.003).non_inferior
    assert non_inferiority(SEGMENTS, words=10_000, margin=found.upper).non_inferior is False  # strictly below
    assert non_inferiority(SEGMENTS, words=10_000) == non_inferiority(SEGMENTS, words=10_000, margin=0.002)


def test_what_is_detectable_by_hand() -> None:
    # sum |d| = 40 + 50 + 6 = 96: a segment that differs has g = 108 / 96 errors; without b's loss of 16 errors the
    # variance would be 108 - 16 g = 90; k solves k = c sqrt(90 + k g), c = 1.959964 + 0.8416212
    k = 10_000 * detectable(SEGMENTS, words=10_000)
    assert k == pytest.approx((1.959964 + 0.8416212) * math.sqrt(90 + k * 108 / 96), rel=1e-6)
    k = 10_000 * detectable(SEGMENTS, words=10_000, alpha=0.01)
    assert k == pytest.approx((2.5758293 + 0.8416212) * math.sqrt(90 + k * 108 / 96), rel=1e-6)


def test_more_speech_of_the_same_kind_shows_smaller_losses() -> None:
    bounds = [non_inferiority(SEGMENTS * times, 10_000 * times).upper for times in (1, 4, 16)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[1] - 0.0016 == pytest.approx((bounds[0] - 0.0016) / 2, rel=0.05)  # the standard error halves
    losses = [detectable(SEGMENTS * times, 10_000 * times) for times in (1, 4, 16)]
    assert losses == sorted(losses, reverse=True) and losses[2] < 0.3 * losses[0]


def test_order_and_common_errors_do_not_count() -> None:
    for segments in (SEGMENTS[::-1], SEGMENTS + [(2, 2)] * 500, [a - b for a, b in SEGMENTS]):
        assert non_inferiority(segments, 10_000).upper == pytest.approx(non_inferiority(SEGMENTS, 10_000).upper)
        assert detectable(segments, 10_000) == pytest.approx(detectable(SEGMENTS, 10_000))


def test_exchanged_systems_are_the_two_ends_of_an_interval() -> None:
    mirrored = [(b, a) for a, b in SEGMENTS]
    upper, lower = non_inferiority(SEGMENTS, 10_000).upper, -non_inferiority(mirrored, 10_000).upper
    assert lower == pytest.approx(0.0016 - 1.6448536 * math.sqrt(108) / 10_000)  # a loses rarely: no growth
    assert lower < 0.0016 < upper and upper - 0.0016 == pytest.approx(0.0016 - lower, rel=0.05)
    assert detectable(mirrored, 10_000) == pytest.approx(detectable(SEGMENTS, 10_000))


@pytest.mark.parametrize(
    "segments, words",
    [([], 100), ([(0, 2)], 100), ([(0, 1)] * 50, 100), ([(1, 1)] * 50, 100), (SEGMENTS, 0), ([], 0)],
)
def test_where_nothing_can_be_said(segments: list[tuple[int, int]], words: int) -> None:
    found = non_inferiority(segments, words, margin=1.0)
    assert found.upper is None and not found.non_inferior and detectable(segments, words) is None


def test_two_segments_that_differ_are_enough() -> None:
    assert non_inferiority([(1, 0), (0, 1)], 100).upper == pytest.approx(1.6448536 * math.sqrt(2) / 100)
    assert detectable([(1, 0), (0, 1)], 100) == pytest.approx(0.095011, abs=1e-6)  # g = 1, v = 2, c^2 = 7.8489
    assert detectable([(0, 1), (0, 2)], 100) == pytest.approx(7.8489 * 5 / 3 / 100, rel=1e-5)  # v = 5 - 3 * 5/3 = 0


@pytest.mark.parametrize("margin", [-0.1, 1.5, math.nan, math.inf])
def test_a_margin_out_of_range_is_refused(margin: float) -> None:
    with pytest.raises(MpqError, match=r"margin: expected a word error rate from 0 to 1 \(0 to 100 points\), got "):
        non_inferiority(SEGMENTS, 100, margin)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(MpqError, match="alpha: expected a number between 0 and 1"):
        detectable(SEGMENTS, 100, alpha=1.0)
    with pytest.raises(MpqError, match="expected finite numbers"):
        non_inferiority([1.0, math.nan], 100)


# ---- simulated pairs with known differences; tests/bench_verdicts.py has more of them


def simulate(pair: Pair, utterances: int, sets: int, margin: float = 0.002, seed: int = 0) -> tuple[float, ...]:
    """Returns how often the test rejects, the bound holds and non-inferiority is shown; the median of what is found."""
    random, words = np.random.default_rng(seed), 15 * utterances
    drawn = [pair.draw(random, utterances) for _ in range(sets)]
    found = [non_inferiority(one, words, margin) for one in drawn]
    return (
        np.mean([mapsswe(one).significant for one in drawn]),
        np.mean([one.upper is not None and one.upper >= pair.difference for one in found]),
        np.mean([one.non_inferior for one in found]),
        np.median([detectable(one, words) or 0.0 for one in drawn]),
    )


@pytest.mark.parametrize(
    "pair",
    [Pair(0.05, 0.012, 0.012), Pair(0.05, 0.012, 0.012, stay=0.5, spread=0.5)],
    ids=["independent words", "bursts, unlike utterances"],
)
def test_simulated_pairs(pair: Pair) -> None:
    """5, 95 and 80 %, within 4 standard errors of 400 simulated test sets."""
    level, coverage, _, loss = simulate(pair, utterances=150, sets=400)
    assert 0.006 < level < 0.094 and 0.906 < coverage < 0.994
    power, coverage, _, itself = simulate(pair.worse_by(loss), utterances=150, sets=400, seed=1)
    assert 0.72 < power < 0.88 and 0.906 < coverage < 0.994
    assert itself == pytest.approx(loss, rel=0.1)  # a pair with this loss says the same of the test set


def test_a_loss_of_the_margin_is_rarely_taken_for_less() -> None:
    """And the bound holds where nearly all errors are b's, where the variance of MAPSSWE alone would hold 80 %."""
    pair = Pair(0.001, 0.0005, 0.01)
    _, coverage, shown, _ = simulate(pair, utterances=800, sets=400, margin=pair.difference)
    assert 0.906 < coverage < 0.994 and 0.006 < shown < 0.094


# ---- several tests


def closed_testing(p: list[float]) -> list[float]:
    """Each hypothesis's largest Bonferroni p among all sets of hypotheses that hold it: the definition."""
    sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    return [max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets if one in s) for one in range(len(p))]


def test_holm_is_closed_testing() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 7):
        p = random.random(size).tolist()
        assert holm(p) == pytest.approx(closed_testing(p))
    assert holm([]) == [] and holm([0.2, 0.2]) == pytest.approx([0.4, 0.4]) and holm([1.0, 1.0]) == [1.0, 1.0]
