"""McNemar's test and the bootstrap against NIST SCTK, SciPy and hand-computed cases."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sctk import CASES, expected

from mpq.errors import MpqError
from mpq.scoring import significance
from mpq.scoring.significance import bootstrap, mcnemar

any_case = settings(deadline=None)  # other work on the machine must not fail a test

# ---- mcnemar


def exact_mcnemar(a, b):
    """2 P(X <= min) with X ~ Bin(a + b, 1/2), 1 when a = b; in integers."""
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return 1.0 if a == b else float(Fraction(2 * tail, 2 ** (a + b)))


@pytest.mark.parametrize("case", CASES)
def test_mcnemar_is_that_of_sc_stats_where_that_is_right(case):
    want = expected(case)["mcnemar_utterance"]
    (_, b_only), (a_only, _) = want["table_rows_a_cols_b"]
    got = mcnemar(a_only, b_only)
    assert got["p"] == pytest.approx(exact_mcnemar(a_only, b_only), rel=1e-12)
    if a_only + b_only <= 20:
        assert got["p"] == pytest.approx(want["p"], rel=1e-12)
        assert got["significant"] == (want["better_system"] is not None)
    else:
        assert "wrong" in want["note"]


@pytest.mark.parametrize("a, b, p", [(19, 21, 0.875), (10, 11, 1.0), (63, 84, 0.099), (0, 0, 1.0), (5, 5, 1.0)])
def test_mcnemar_where_sc_stats_is_wrong_or_there_is_nothing(a, b, p):
    got = mcnemar(a, b)
    assert (got["a_only_wrong"], got["b_only_wrong"], got["significant"]) == (a, b, False)
    assert got["p"] == pytest.approx(p, abs=1e-3)


@any_case
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_exact(a, b):
    got = mcnemar(a, b, alpha=0.2)
    assert got["p"] == pytest.approx(exact_mcnemar(a, b), rel=1e-9) == pytest.approx(mcnemar(b, a)["p"], rel=1e-9)
    assert got["significant"] == (got["p"] < 0.2)


# ---- bootstrap


def test_bootstrap_agrees_with_scipy():
    draw = np.random.default_rng(1)
    counts = draw.integers(1, 30, 200)
    a, b = draw.binomial(counts, 0.10), draw.binomial(counts, 0.13)
    got = bootstrap(a, b, counts, resamples=4000, seed=3)
    witness = scipy.stats.bootstrap(
        (b - a, counts),
        lambda difference, count, axis=-1: difference.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    width = witness.high - witness.low
    assert got["difference"] == pytest.approx((b.sum() - a.sum()) / counts.sum(), rel=1e-12)
    assert abs(got["low"] - witness.low) < 0.06 * width and abs(got["high"] - witness.high) < 0.06 * width
    assert (got["level"], got["resamples"], got["seed"]) == (0.95, 4000, 3)
    narrower = bootstrap(a, b, counts, alpha=0.5, resamples=4000, seed=3)
    assert got["low"] < narrower["low"] < narrower["high"] < got["high"]


def test_bootstrap_of_a_constant_difference_has_no_width():
    got = bootstrap([0] * 5, [1] * 5, [4] * 5, resamples=50)
    assert got["difference"] == got["low"] == got["high"] == 0.25


def test_bootstrap_mirrors_and_repeats_and_does_not_depend_on_its_blocks(monkeypatch):
    a, b, counts = [0, 1, 2, 0, 5, 1], [1, 0, 2, 3, 0, 0], [5, 3, 8, 9, 6, 1]
    got, mirrored = bootstrap(a, b, counts, seed=7), bootstrap(b, a, counts, seed=7)
    assert (mirrored["low"], mirrored["high"]) == pytest.approx((-got["high"], -got["low"]), rel=1e-12)
    assert bootstrap(a, b, counts, seed=7) == got
    assert bootstrap(a, b, counts, seed=8) != {**got, "seed": 8}
    monkeypatch.setattr(significance, "BLOCK_DRAWS", 100)
    assert bootstrap(a, b, counts, seed=7) == got


def test_bootstrap_without_reference_words_is_zero():
    got = bootstrap([0, 2], [1, 0], [0, 0], resamples=20)
    assert got["difference"] == got["low"] == got["high"] == 0.0


@pytest.mark.parametrize(
    "lists, options, message",
    [
        (([], [], []), {}, "1 or more; got 0"),
        (([1], [1, 2], [3, 3]), {}, "same length"),
        (([1], [1], [3]), {"resamples": 0}, "resamples: expected 1 or more, got 0"),
        (([1], [1], [3]), {"seed": -1}, "seed: expected 0 or more, got -1"),
        (([1], [1], [3]), {"alpha": 2}, "alpha"),
    ],
)
def test_bootstrap_refuses(lists, options, message):
    with pytest.raises(MpqError, match=message):
        bootstrap(*lists, **options)
