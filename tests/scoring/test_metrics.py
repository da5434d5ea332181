"""Word errors against sclite and jiwer, and what `mpq evaluate` counts."""

import json
from pathlib import Path

import jiwer
import pytest

from mpq.errors import MpqError
from mpq.scoring.metrics import measure, score
from mpq.scoring.significance import align
from mpq.speech.trn import read_trn

GOLDEN = Path(__file__).parents[1] / "golden" / "mapsswe"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.json"))


def texts_of(case, name):
    return [" ".join(words) for words in read_trn(GOLDEN / case / name).utterances.values()]


@pytest.mark.parametrize("system", ["a", "b"])
@pytest.mark.parametrize("case", CASES)
def test_score_is_the_sum_row_of_sclite(case, system):
    want = json.loads((GOLDEN / case / "expected.json").read_text(encoding="utf-8"))["systems"][system]
    ref, hyp = read_trn(GOLDEN / case / "ref.trn").utterances, read_trn(GOLDEN / case / f"hyp_{system}.trn").utterances
    got = score("x", [align(words, hyp[utt_id]) for utt_id, words in ref.items()])
    assert got.to_json() == {
        "name": "x",
        "wer": pytest.approx(want["wer_pct"] / 100, rel=1e-14),
        "corr": want["corr"],
        "sub": want["sub"],
        "del": want["del"],
        "ins": want["ins"],
        "sentence_errors": want["utt_err"],
    }


def test_score_without_reference_words_is_zero():
    got = score("x", ["II", ""])
    assert (got.wer, got.insertions, got.sentence_errors) == (0.0, 2, 1)


@pytest.mark.parametrize("system", ["a", "b"])
@pytest.mark.parametrize("case", ["mixed_60", "insertions_heavy"])
def test_measure_agrees_with_jiwer(case, system):
    references, hypotheses = texts_of(case, "ref.trn"), texts_of(case, f"hyp_{system}.trn")
    got = measure(references, references, hypotheses, [1.0] * len(references))
    witness = jiwer.process_words(references, hypotheses)
    errors = witness.substitutions + witness.deletions + witness.insertions
    assert got.substitutions + got.deletions + got.insertions == errors
    assert got.wer == pytest.approx(witness.wer, rel=1e-14)
    assert got.words == witness.hits + witness.substitutions + witness.deletions
    assert got.utterances == len(references)


def test_measure_of_a_hand_made_set():
    got = measure(
        ["u1", "u2", "u3", "u4", "u5"],
        ["A b C d", "a b", "", "", "a b c"],
        ["a B x", "", "", "q", "a b c"],
        [1.5, 2.0, 20.0, 100.0, 9.999],
    )
    assert got.to_json() == {
        "format": "mpq.metrics/1",
        "wer": 5 / 9,  # u1: one substitution, one deletion; u2: two deletions; u4: one insertion
        "corr": 5,
        "sub": 1,
        "del": 3,
        "ins": 1,
        "words": 9,
        "utterances": 5,
        "sentence_errors": 3,
        "empty_outputs": 1,
        "loop_outputs": 0,
        "by_length": [
            {"min_seconds": 0.0, "max_seconds": 2.0, "utterances": 1, "words": 4, "errors": 2, "wer": 0.5},
            {"min_seconds": 2.0, "max_seconds": 5.0, "utterances": 1, "words": 2, "errors": 2, "wer": 1.0},
            {"min_seconds": 5.0, "max_seconds": 10.0, "utterances": 1, "words": 3, "errors": 0, "wer": 0.0},
            {"min_seconds": 20.0, "max_seconds": None, "utterances": 2, "words": 0, "errors": 1, "wer": 0.0},
        ],
        "audio_seconds": pytest.approx(133.499),
    }
    json.dumps(got.to_json(), allow_nan=False)


@pytest.mark.parametrize("edge", [0.0, 2.0, 5.0, 10.0, 20.0])
def test_measure_puts_an_edge_into_the_bucket_above(edge):
    (bucket,) = measure(["u"], ["a"], ["b"], [edge]).by_length
    assert bucket.min_seconds == edge and bucket.wer == 1.0


def test_measure_buckets_add_up():
    references, hypotheses = texts_of("mixed_60", "ref.trn"), texts_of("mixed_60", "hyp_a.trn")
    got = measure(references, references, hypotheses, [0.7 * index for index in range(60)])
    assert [bucket.min_seconds for bucket in got.by_length] == [0.0, 2.0, 5.0, 10.0, 20.0]
    assert sum(bucket.utterances for bucket in got.by_length) == 60
    assert sum(bucket.words for bucket in got.by_length) == got.words
    assert sum(bucket.errors for bucket in got.by_length) == got.substitutions + got.deletions + got.insertions


@pytest.mark.parametrize(
    "reference, hypothesis, loops",
    [
        ("a b", "x y y y y z", 1),  # a word four times
        ("a b", "x y y y z", 0),  # three times
        ("a b", "y z " * 4, 1),
        ("a b", "y z " * 3 + "y", 0),
        ("a b", "p q r s " * 4, 1),
        ("a b", "p q r s t " * 4, 0),  # five words are no loop
        ("no no no no", "No no no NO", 0),  # the speaker said so
        ("no no no", "no no no no", 1),
        ("no no no no", "no no no no the the the the", 1),
        ("", "a a a a", 1),
        ("a", "", 0),
    ],
)
def test_measure_counts_loops(reference, hypothesis, loops):
    assert measure(["u"], [reference], [hypothesis], [1.0]).loop_outputs == loops


def test_measure_finds_the_loops_of_a_decoder_that_loops():
    """insertions_heavy was made with repeated n-grams in a; mixed_60 without."""
    for case, want in [("insertions_heavy", True), ("mixed_60", False)]:
        references, hypotheses = texts_of(case, "ref.trn"), texts_of(case, "hyp_a.trn")
        assert (measure(references, references, hypotheses, [1.0] * len(references)).loop_outputs > 0) == want


def test_measure_of_nothing():
    got = measure([], [], [], [])
    assert (got.wer, got.words, got.utterances, got.by_length, got.audio_seconds) == (0.0, 0, 0, (), 0.0)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_measure_refuses_a_duration_that_is_none(seconds):
    with pytest.raises(MpqError, match="utterance 'u2': duration: expected 0 seconds or more, got"):
        measure(["u1", "u2"], ["a", "a"], ["a", "a"], [1.0, seconds])
