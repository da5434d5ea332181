"""trn files against the rules of sclite, word errors against sclite and jiwer, and what `mpq evaluate` counts."""

import doctest
import json
import tempfile
from pathlib import Path

import jiwer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.scoring import metrics
from mpq.scoring.metrics import measure, score
from mpq.scoring.significance import align
from mpq.speech.trn import read_trn, split_words, write_trn

GOLDEN = Path(__file__).parents[1] / "golden" / "mapsswe"
any_case = settings(deadline=None)  # file systems stall
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.json"))


def read(tmp_path, text):
    path = tmp_path / "x.trn"
    path.write_bytes(text.encode("utf-8"))
    return read_trn(path).utterances


def texts_of(case, name):
    return [" ".join(words) for words in read_trn(GOLDEN / case / name).utterances.values()]


def test_doctests():
    result = doctest.testmod(metrics)
    assert result.attempted >= 1 and result.failed == 0


# ---- reading


@pytest.mark.parametrize(
    "text, want",
    [
        ("the cat (u1)\na dog (u2)\n", {"u1": ("the", "cat"), "u2": ("a", "dog")}),
        ("the cat (u1)", {"u1": ("the", "cat")}),  # no final newline
        (" (u1)\n(u2)\n", {"u1": (), "u2": ()}),
        ("a(u1)\r\n\r\nb  (u2) \t\n", {"u1": ("a",), "u2": ("b",)}),
        (";; a comment (u1)\n** another (u1)\n\nb (u1)\n", {"u1": ("b",)}),
        ("a (noise) b (u1)\n", {"u1": ("a", "(noise)", "b")}),
        ("a (u1)b)\n", {"u1)b": ("a",)}),  # up to the last parenthesis
        ("a (my file)\n", {"my file": ("a",)}),
        ("a\tb\vc\fd\re (u1)\n", {"u1": ("a", "b", "c", "d", "e")}),
        ("* a*b - -x (u1)\n", {"u1": ("*", "a*b", "-", "-x")}),
        ("", {}),
    ],
)
def test_read_trn(tmp_path, text, want):
    assert read(tmp_path, text) == want


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u0085", "\u2028", "\u2029", "\x1c", "\x1f"])
def test_read_trn_splits_on_ascii_white_space_only(tmp_path, space):
    assert read(tmp_path, f"a{space}b c (u1)\nd (u2)\n") == {"u1": (f"a{space}b", "c"), "u2": ("d",)}


def test_read_trn_folds_a_to_z_only(tmp_path):
    assert read(tmp_path, "ABC ÄÖ İ Σ (Spk-É1)\n") == {"spk-É1": ("abc", "ÄÖ", "İ", "Σ")}


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("a (u1)\nb c\n", 2, r"expected words and then an utterance id in parentheses, got 'b c'"),
        ("a u1)\n", 1, "utterance id"),
        ("a (u1\n", 1, "utterance id"),
        ("a ()\n", 1, "utterance id"),
        ("a )u1(\n", 1, "utterance id"),
        ("a (u1) b\n", 1, "utterance id"),
        ("a (u1)\n;;\nb (u2)\nc (U1)\n", 4, r"the utterance \(u1\) is already on line 1"),
        ("a {b / c} (u1)\n", 1, "'{b' holds {"),
        ("a b} (u1)\n", 1, "'b}' holds }"),
        ("a @ (u1)\n", 1, "'@' holds @"),
        ("a b;x (u1)\n", 1, "'b;x' holds ;"),
        ('a "b" (u1)\n', 1, 'holds "'),
        ("a um* (u1)\n", 1, r"'um\*' ends in \*, which SCTK strips"),
        ("a m* (u1)\n", 1, r"'m\*' ends in \*"),
        ("\ufeffa (u1)\n", 1, r"holds U\+FEFF"),
    ],
)
def test_read_trn_refuses_with_file_and_line(tmp_path, text, line, message):
    with pytest.raises(MpqError, match=rf"x\.trn: line {line}: .*{message}"):
        read(tmp_path, text)


# ---- writing


def test_write_trn_pins_its_bytes(tmp_path):
    write_trn(tmp_path / "x.trn", ["U1", "u 2"], [" The\tÄ\u00a0cat ", ""])
    assert (tmp_path / "x.trn").read_bytes() == "The Ä\u00a0cat (U1)\n(u 2)\n".encode()
    assert read_trn(tmp_path / "x.trn").utterances == {"u1": ("the", "Ä\u00a0cat"), "u 2": ()}


@pytest.mark.parametrize(
    "utt_ids, texts, message",
    [
        (["a", "A"], ["x", "x"], "utterance 'A': the same id as that of 'a'"),
        (["a", "a"], ["x", "x"], "utterance 'a': the same id as that of 'a'"),
        ([""], ["x"], "expected an id of one character or more"),
        (["rec(1"], ["x"], "without parentheses"),
        (["rec)"], ["x"], "without parentheses"),
        (["a\nb"], ["x"], "line ends"),
        (["a"], ["x; y"], "utterance 'a': the word 'x;' holds ;"),
        (["a"], ["x**"], r"'x\*\*' ends in \*"),
        (["a"], ["**x"], r"the first word '\*\*x' starts with \*\*, a comment"),
        (["a"], ["x \ud800"], r"holds U\+D800"),
    ],
)
def test_write_trn_refuses_and_leaves_no_file(tmp_path, utt_ids, texts, message):
    with pytest.raises(MpqError, match=message):
        write_trn(tmp_path / "x.trn", utt_ids, texts)
    assert list(tmp_path.iterdir()) == []


texts = st.text(st.one_of(st.sampled_from("abAÄ()*;@{- \t\n\r\u00a0\u2028\ufeff"), st.characters()), max_size=12)


@any_case
@given(st.lists(st.tuples(texts, texts), max_size=4))
@example([("a", "(b)"), ("c)", " * ** ")])
def test_what_write_trn_accepts_reads_back_as_the_same_words(utterances):
    utt_ids, hypotheses = [pair[0] for pair in utterances], [pair[1] for pair in utterances]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.trn"
        try:
            write_trn(path, utt_ids, hypotheses)
        except MpqError as error:
            assert "utterance" in str(error)
            return
        got = read_trn(path).utterances
    assert list(got) == [metrics.fold(utt_id) for utt_id in utt_ids]
    assert list(got.values()) == [split_words(text) for text in hypotheses]


@any_case
@given(st.lists(st.text("abcXYZ-é'", min_size=1), max_size=5), st.text("abc-_. 019é", min_size=1))
def test_write_trn_accepts_ordinary_text(words, utt_id):
    with tempfile.TemporaryDirectory() as folder:
        write_trn(Path(folder) / "x.trn", [utt_id], [" ".join(words)])
        assert read_trn(Path(folder) / "x.trn").utterances == {utt_id: split_words(" ".join(words))}


# ---- counting


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
