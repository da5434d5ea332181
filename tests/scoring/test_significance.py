"""Alignment and MAPSSWE against NIST SCTK's own output, brute force, SciPy and hand-computed cases."""

import doctest
import itertools
import math
import random
import re

import jiwer
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sctk import CASES, GOLDEN, expected

from mpq.errors import MpqError
from mpq.scoring import significance
from mpq.scoring.significance import align, count_errors, mapsswe, segments
from mpq.speech.trn import read_trn

any_case = settings(deadline=None)  # other work on the machine must not fail a test

words = st.lists(st.sampled_from("abc"), max_size=12)
differences = st.lists(st.integers(-4, 4), max_size=80)


@st.composite
def alignment_pairs(draw):
    """Two alignments over one reference, mostly right so that all kinds of gaps between errors occur."""

    def alignment(length):
        gaps = draw(st.lists(st.sampled_from([0, 0, 0, 0, 1, 2]), min_size=length + 1, max_size=length + 1))
        marks = draw(st.lists(st.sampled_from("CCCCSD"), min_size=length, max_size=length))
        return "".join("I" * gap + mark for gap, mark in zip(gaps, [*marks, ""], strict=True))

    length = draw(st.integers(0, 25))
    return alignment(length), alignment(length)


def segments_of_case(case):
    alignments = expected(case)["alignments"]
    return [pair for utt_id in alignments["a"] for pair in segments(alignments["a"][utt_id], alignments["b"][utt_id])]


def test_all_five_cases_are_there():
    assert CASES == ["empty_hyps", "insertions_heavy", "mixed_60", "repeated_words", "tiny_rules"]


def test_doctests():
    result = doctest.testmod(significance)
    assert result.attempted >= 5 and result.failed == 0


# ---- align


@pytest.mark.parametrize("system", ["a", "b"])
@pytest.mark.parametrize("case", CASES)
def test_align_is_that_of_sclite(case, system):
    ref = read_trn(GOLDEN / case / "ref.trn").utterances
    hyp = read_trn(GOLDEN / case / f"hyp_{system}.trn").utterances
    got = {f"({utt_id})": align(reference, hyp[utt_id]) for utt_id, reference in ref.items()}
    assert got == expected(case)["alignments"][system]


def all_alignments(n, m):
    """Every way to consume n reference and m hypothesis words: strings over "=" (diagonal), "I", "D"."""
    if n == m == 0:
        yield ""
    if n and m:
        yield from (path + "=" for path in all_alignments(n - 1, m - 1))
    if m:
        yield from (path + "I" for path in all_alignments(n, m - 1))
    if n:
        yield from (path + "D" for path in all_alignments(n - 1, m))


def label(path, reference, hypothesis):
    letters, i, j = [], 0, 0
    for step in path:
        letters.append(("C" if reference[i] == hypothesis[j] else "S") if step == "=" else step)
        i, j = i + (step != "I"), j + (step != "D")
    return "".join(letters)


def cost(alignment):
    return 4 * alignment.count("S") + 3 * alignment.count("I") + 3 * alignment.count("D")


def brute_force(reference, hypothesis):
    """The cheapest of all alignments; of those the one that, read from the end, prefers diagonal, then I, then D."""
    candidates = [label(path, reference, hypothesis) for path in all_alignments(len(reference), len(hypothesis))]
    rank = {"C": 0, "S": 0, "I": 1, "D": 2}
    return min(candidates, key=lambda letters: (cost(letters), [rank[letter] for letter in reversed(letters)]))


def test_align_is_the_best_of_all_alignments():
    texts = ["".join(text) for length in range(5) for text in itertools.product("ab", repeat=length)]
    texts += ["abcab", "bcabc", "cabba", "accbb"]
    for reference, hypothesis in itertools.product(texts, repeat=2):
        assert align(reference, hypothesis) == brute_force(reference, hypothesis), (reference, hypothesis)


@any_case
@given(words, words)
def test_align_follows_the_recurrence_of_the_specification(reference, hypothesis):
    """The rules as section 2 of the specification words them, without any short cut, on longer inputs."""
    n, m = len(reference), len(hypothesis)
    D = [[3 * (i + j) for j in range(m + 1)] for i in range(n + 1)]
    move = [["D"] * (m + 1) for _ in range(n + 1)]
    move[0] = ["I"] * (m + 1)
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            is_equal = reference[i - 1] == hypothesis[j - 1]
            s, d, ins = D[i - 1][j - 1] + (0 if is_equal else 4), D[i - 1][j] + 3, D[i][j - 1] + 3
            D[i][j] = min(s, d, ins)
            move[i][j] = ("C" if is_equal else "S") if s <= d and s <= ins else "D" if d < ins else "I"
    letters, i, j = "", n, m
    while i or j:
        letters = move[i][j] + letters
        i, j = i - (letters[0] != "I"), j - (letters[0] != "D")
    assert align(reference, hypothesis) == letters
    assert cost(letters) == D[n][m]


def test_costs_are_not_levenshtein():
    """5 substitutions (20) lose to 3 I + 2 C + 3 D (18): six errors where Levenshtein has five."""
    reference, hypothesis = "a b c d e", "x y z a b"
    assert align(reference.split(), hypothesis.split()) == "IIICCDDD"
    witness = jiwer.process_words(reference, hypothesis)
    assert witness.substitutions + witness.deletions + witness.insertions == 5


def test_align_ties_before_an_equal_first_word():
    assert align("a", "aa") == "IC" and align("aa", "a") == "DC"


def test_align_with_nothing():
    assert align([], []) == "" and align([], ["a", "b"]) == "II" and align(["a", "b"], []) == "DD"


def test_align_agrees_with_jiwer_on_ordinary_errors():
    """At 10 % errors over a large vocabulary the number of errors is the edit distance."""
    draw = random.Random(5)
    for _ in range(200):
        reference = [f"w{draw.randrange(500)}" for _ in range(draw.randrange(5, 40))]
        hypothesis = []
        for word in reference:
            event = draw.random()
            hypothesis += [] if event < 0.03 else [f"w{draw.randrange(500)}"] if event < 0.08 else [word]
            hypothesis += [f"w{draw.randrange(500)}"] if event > 0.98 else []
        witness = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        errors = witness.substitutions + witness.deletions + witness.insertions
        assert count_errors(align(reference, hypothesis)) == errors


# ---- segments


@pytest.mark.parametrize("case", CASES)
def test_segments_are_those_of_sc_stats(case):
    want = expected(case)
    got = [
        [utt_id, *pair]
        for utt_id, alignment in want["alignments"]["a"].items()
        for pair in segments(alignment, want["alignments"]["b"][utt_id])
    ]
    assert got == [row[:3] for row in want["mapsswe"]["segment_list"]]
    assert len(got) == want["mapsswe"]["segments"]
    assert sum(row[1] for row in got) == want["mapsswe"]["errors_a"] == want["systems"]["a"]["err"]
    assert sum(row[2] for row in got) == want["mapsswe"]["errors_b"] == want["systems"]["b"]["err"]
    table = [[0, 0], [0, 0]]
    for _, errors_a, errors_b in got:
        table[errors_a > 0][errors_b > 0] += 1
    assert table == want["mapsswe"]["segment_table_rows_a_cols_b"]


@any_case
@given(alignment_pairs())
def test_segments_are_what_two_good_words_separate(pair):
    """Another formulation: write the utterance as good words "g" and error events, split at runs of two or more g."""
    tokens, errors = "", []
    split = [(re.findall("I*[CSD]", x), len(x) - len(x.rstrip("I"))) for x in pair]
    for token_a, token_b in zip(split[0][0], split[1][0], strict=True):
        events = [(token_a.count("I"), token_b.count("I")), (token_a[-1] != "C", token_b[-1] != "C")]
        tokens += ("e" if any(events[0]) else "") + ("e" if any(events[1]) else "g")
        errors += [event for event in events if any(event)]
    if split[0][1] or split[1][1]:
        tokens, errors = tokens + "e", [*errors, (split[0][1], split[1][1])]
    remaining = iter(errors)
    want = []
    for piece in filter(None, (re.sub("g", "", piece) for piece in re.split("gg+", tokens))):
        inside = list(itertools.islice(remaining, len(piece)))
        want.append((sum(event[0] for event in inside), sum(event[1] for event in inside)))
    assert segments(*pair) == want


@any_case
@given(alignment_pairs())
def test_segments_hold_every_error_once_and_mirror(pair):
    found = segments(*pair)
    assert (sum(a for a, _ in found), sum(b for _, b in found)) == tuple(map(count_errors, pair))
    assert all(a or b for a, b in found)
    assert segments(*pair[::-1]) == [(b, a) for a, b in found]


def test_segments_refuse_what_is_no_pair_of_alignments():
    with pytest.raises(MpqError, match="same reference words, got 2 in 'CIC' and 3 in 'CCC'"):
        segments("CIC", "CCC")
    with pytest.raises(MpqError, match="over C, S, D and I, got 'CXC'"):
        segments("CXC", "CCC")


# ---- mapsswe


@pytest.mark.parametrize("case", CASES)
def test_mapsswe_is_that_of_sc_stats_to_the_last_bit(case):
    want = expected(case)["mapsswe"]
    precise = want["full_precision"]
    got = mapsswe(segments_of_case(case))
    assert (got.segments, got.mean, got.std, got.z) == (
        want["segments"],
        precise["mean"],
        precise["std_dev"],
        precise["z"],
    )
    assert got.std**2 == pytest.approx(precise["variance"], rel=1e-14)
    assert got.p_sctk == pytest.approx(precise["p_table"], abs=2e-7)  # twice a table entry of seven digits
    assert f"{got.p_sctk:.3f}" == want["unified"]["p_printed"]
    assert got.p == pytest.approx(2 * scipy.stats.norm.sf(abs(precise["z"])), rel=1e-12)
    assert (got.significant, got.better) == (want["significant"], want["better_system"])
    assert ("normal approximation" in got.note) == (want["segments"] < 30)


@pytest.mark.parametrize("case", CASES)
def test_mapsswe_prints_as_sc_stats_in_both_orders(case):
    printed = re.findall(
        r"# segs: (\d+)\).*\(mean: (\S+)\) \(std dev: (\S+)\) \(Z Stat: (\S+)\) \(Stat Diff: (Yes|No)\)",
        (GOLDEN / case / "sc_stats.txt").read_text(encoding="utf-8"),
    )
    assert len(printed) == 2
    pairs = segments_of_case(case)
    for order, want in zip([pairs, [(b, a) for a, b in pairs]], printed, strict=True):
        got = mapsswe(order)
        verdict = "Yes" if got.significant else "No"
        assert (str(got.segments), f"{got.mean:.3f}", f"{got.std:.3f}", f"{got.z:.3f}", verdict) == want


def test_mapsswe_of_sctks_own_test_1a():
    """Three segments, z printed as 2.000 but 1.9999999999999998, so p is that of 1.99; no smallest n."""
    got = mapsswe([(1, 1), (1, 0), (2, 1)])
    assert got.z == 1.9999999999999998
    assert got.mean == pytest.approx(2 / 3) and got.std == pytest.approx(math.sqrt(1 / 3))
    assert got.p_sctk == pytest.approx(0.04659, abs=5e-6) and got.p == pytest.approx(0.04550, abs=5e-6)
    assert got.significant and got.better == "b"
    assert got.note == "only 3 segments: below 30 the normal approximation is doubtful"


def test_mapsswe_without_segments():
    for nothing in ([], np.zeros((0, 2)), np.zeros(0)):
        got = mapsswe(nothing)
        assert (got.segments, got.mean, got.std) == (0, 0.0, 0.0)
        assert (got.z, got.p, got.p_sctk, got.significant, got.better) == (None, None, None, False, None)
        assert "no errors in either system" in got.note


@pytest.mark.parametrize(
    "pairs, note",
    [
        ([(3, 1)], "one segment, difference +2: variance 0"),
        ([(1, 0)] * 60, "all 60 segments differ by +1 errors: variance 0"),
        ([(0, 1)] * 60, "all 60 segments differ by -1 errors: variance 0"),
        ([(1, 1), (2, 2)], "all 2 segments differ by +0 errors: variance 0"),
    ],
)
def test_mapsswe_without_variance_is_undefined_and_says_so(pairs, note):
    got = mapsswe(pairs)
    assert (got.segments, got.mean, got.std) == (len(pairs), pairs[0][0] - pairs[0][1], 0.0)
    assert (got.z, got.p, got.p_sctk, got.significant, got.better) == (0.0, 1.0, 1.0, False, None)
    assert got.note.startswith(note) and "undefined" in got.note
    assert ("normal approximation" in got.note) == (len(pairs) < 30)


def test_mapsswe_doubts_fewer_than_thirty_segments():
    assert "only 29 segments" in mapsswe([0, 1] * 14 + [0]).note
    assert mapsswe([0, 1] * 15).note == ""


def test_mapsswe_verdict_is_strictly_above_1_960():
    """Differences (z + 1, z - 1) have standard error 1, so that their statistic is z."""
    at = mapsswe([2.96, 0.96])
    assert at.z == 1.96 and not at.significant and at.better is None
    below = mapsswe([2.95998, 0.95998])
    assert below.p < 0.05 and not below.significant  # the critical value is 1.960, not 1.95996
    above = mapsswe([2.961, 0.961])
    assert above.significant and above.better == "b"
    other = mapsswe([-2.961, -0.961])
    assert other.significant and other.better == "a"


@pytest.mark.parametrize("alpha, critical", [(0.01, 2.575829), (0.1, 1.644854), (0.3173, 1.000022)])
def test_mapsswe_at_other_levels_uses_the_normal_quantile(alpha, critical):
    for z, want in [(critical - 1e-5, False), (critical + 1e-5, True)]:
        got = mapsswe([z + 1, z - 1], alpha)
        assert got.significant == want == (got.p < alpha)


def test_mapsswe_p_of_sctk_ends_at_5_14():
    assert mapsswe([6.15, 4.15]).p_sctk == 2e-7
    below = mapsswe([6.135, 4.135]).p_sctk
    assert below == pytest.approx(2 * scipy.stats.norm.sf(5.13), rel=1e-9) and below > 2e-7


def test_mapsswe_p_of_sctk_is_looked_up_and_not_floored():
    """sc_stats compares z with 0, 0.01, ...: floor(100 z) would say 80 and 56, as 100 z rounds."""
    below = mapsswe([-2, 3, 3])
    assert below.z == 0.7999999999999999
    assert below.p_sctk == pytest.approx(2 * scipy.stats.norm.sf(0.79), rel=1e-9)
    equal = mapsswe([0.57 + 1, 0.57 - 1])
    assert equal.z == 0.57 and equal.p_sctk == pytest.approx(equal.p, rel=1e-9)


@pytest.mark.parametrize("z, abscissa", [(0.09999995, 0.1), (0.98999995, 0.99), (0.0999998, 0.09), (0.9899998, 0.98)])
def test_mapsswe_p_of_sctk_at_the_two_uneven_entries_of_its_table(z, abscissa):
    assert mapsswe([z + 1, z - 1]).p_sctk == pytest.approx(2 * scipy.stats.norm.sf(abscissa), rel=1e-9)


@any_case
@given(differences.filter(lambda values: len(set(values)) > 1))
def test_mapsswe_is_the_t_statistic_against_the_normal(values):
    got = mapsswe(values)
    z = scipy.stats.ttest_1samp(values, 0).statistic
    assert got.z == pytest.approx(z, rel=1e-12, abs=1e-12)
    assert got.p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-9)
    assert got.std == pytest.approx(np.std(values, ddof=1))
    assert got.p_sctk >= got.p * (1 - 1e-6) or got.p_sctk == 2e-7


@any_case
@given(differences)
def test_mapsswe_mirrors_when_the_systems_are_exchanged(values):
    got, mirrored = mapsswe(values), mapsswe([-value for value in values])
    assert (mirrored.mean, mirrored.std, mirrored.p, mirrored.significant) == (
        -got.mean,
        got.std,
        got.p,
        got.significant,
    )
    assert mirrored.z == (None if got.z is None else -got.z)
    assert mirrored.better == {"a": "b", "b": "a", None: None}[got.better]


def test_mapsswe_takes_pairs_or_differences():
    pairs = [(3, 1), (0, 1), (1, 0)]
    assert mapsswe(pairs) == mapsswe([2, -1, 1]) == mapsswe(np.array(pairs))


@pytest.mark.parametrize(
    "value, alpha, message",
    [
        ([(1, 2, 3)], 0.05, r"shape \(n, 2\) or differences of shape \(n,\), got \(1, 3\)"),
        (3, 0.05, r"got \(\)"),
        ([(1, 2), (3,)], 0.05, "expected pairs of numbers"),
        (["CSC"], 0.05, "expected pairs of numbers"),
        ([1, float("nan")], 0.05, "finite"),
        ([1, 2], 0.0, "alpha: expected a number between 0 and 1, got 0.0"),
        ([1, 2], 1.0, "alpha"),
        ([1, 2], float("nan"), "alpha"),
    ],
)
def test_mapsswe_refuses(value, alpha, message):
    with pytest.raises(MpqError, match=message):
        mapsswe(value, alpha)
