"""trn files against the rules of sclite."""

import doctest
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.speech import trn
from mpq.speech.trn import fold, read_trn, split_words, write_trn

any_case = settings(deadline=None)  # file systems stall


def read(tmp_path, text):
    path = tmp_path / "x.trn"
    path.write_bytes(text.encode("utf-8"))
    return read_trn(path).utterances


def test_doctests() -> None:
    result = doctest.testmod(trn)
    assert result.attempted >= 2 and result.failed == 0


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
    assert list(got) == [fold(utt_id) for utt_id in utt_ids]
    assert list(got.values()) == [split_words(text) for text in hypotheses]


@any_case
@given(st.lists(st.text("abcXYZ-é'", min_size=1), max_size=5), st.text("abc-_. 019é", min_size=1))
def test_write_trn_accepts_ordinary_text(words, utt_id):
    with tempfile.TemporaryDirectory() as folder:
        write_trn(Path(folder) / "x.trn", [utt_id], [" ".join(words)])
        assert read_trn(Path(folder) / "x.trn").utterances == {utt_id: split_words(" ".join(words))}
