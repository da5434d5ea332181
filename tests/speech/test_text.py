"""Tokenizers made from transcripts: their vocabularies, round trips, and what they refuse."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LABELS

from mpq.errors import MpqError
from mpq.speech.text import (
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    tokenizer_from_config,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "a cat  ate\tthe rat", "", "that hat"]


def made(kind: str, texts: list[str] = TEXTS) -> Tokenizer:
    return train_tokenizer(kind, texts, 20 if kind == "bpe" else None)


def test_characters() -> None:
    tokenizer = made("characters")
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.pieces == tuple(" acehmnorst")
    assert tokenizer.encode("a cat") == [1, 0, 2, 1, 10]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_words() -> None:
    tokenizer = made("words")
    assert isinstance(tokenizer, WordTokenizer)
    assert tokenizer.pieces == ("a", "ate", "cat", "hat", "mat", "on", "rat", "sat", "that", "the")
    assert tokenizer.encode(" the  cat\n") == [9, 2] and tokenizer.decode([9, 2]) == "the cat"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_bpe() -> None:
    tokenizer = made("bpe")
    assert isinstance(tokenizer, SentencePieceTokenizer) and len(tokenizer.pieces) == 20
    assert "<s>" not in tokenizer.pieces and "</s>" not in tokenizer.pieces  # the model has an <eos> of its own
    assert len(tokenizer.encode("the cat")) < len("the cat")  # pieces of several letters
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_the_same_transcripts_give_the_same_tokenizer(kind: str) -> None:
    assert made(kind).to_config() == made(kind).to_config()
    if kind != "bpe":  # whose ties go by order
        assert made(kind).to_config() == made(kind, TEXTS[::-1]).to_config()


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
@given(st.lists(st.sampled_from("the cat sat on mat a ate rat that hat".split()), max_size=8).map(" ".join))
def test_round_trips(kind: str, text: str) -> None:
    tokenizer, again = with_copy(kind)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and tokenizer.missing(text) == []
    assert all(0 <= token < len(tokenizer.pieces) for token in tokens)
    assert again.pieces == tokenizer.pieces and again.encode(text) == tokens


@cache
def with_copy(kind: str) -> tuple[Tokenizer, Tokenizer]:
    """Returns a tokenizer and what its configuration makes."""
    tokenizer = made(kind)
    return tokenizer, tokenizer_from_config(*tokenizer.to_config())


@pytest.mark.parametrize(
    ("kind", "missing"), [("characters", ["d", "g"]), ("words", ["dog", "god"]), ("bpe", ["d", "g"])]
)
def test_what_the_vocabulary_lacks(kind: str, missing: list[str]) -> None:
    """Each once, in the order in which they come."""
    tokenizer = made(kind)
    assert tokenizer.missing("the dog god") == missing
    with pytest.raises(MpqError, match=f"text 'the dog god': the vocabulary of {len(tokenizer.pieces)} tokens lacks"):
        tokenizer.encode("the dog god")


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
@pytest.mark.parametrize("texts", [[], ["", "  \t"]])
def test_no_words_to_make_a_vocabulary_from(kind: str, texts: list[str]) -> None:
    with pytest.raises(MpqError, match="tokens: the transcripts have no words to make a vocabulary from"):
        made(kind, texts)


@pytest.mark.parametrize(("size", "pattern"), [(5000, r"too high.*<= \d+"), (3, r"\d+")])
def test_bpe_of_a_size_that_cannot_be_says_which_can(
    size: int, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MpqError, match=rf"tokens: bpe of {size}: .*{pattern}") as error:
        train_tokenizer("bpe", TEXTS, size)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_bpe_of_one_character_more_than_are_there_is_possible() -> None:
    """The largest vocabulary that the message names can be made."""
    with pytest.raises(MpqError) as error:
        train_tokenizer("bpe", TEXTS, 5000)
    largest = int(str(error.value).rstrip(".").rpartition(" ")[2])
    assert len(train_tokenizer("bpe", TEXTS, largest).pieces) == largest


def test_a_tokenizer_of_a_later_version() -> None:
    with pytest.raises(MpqError, match="expected characters, words or sentencepiece, got 'phones'"):
        tokenizer_from_config({"type": "phones"}, b"")


def test_other_alphabets() -> None:
    texts = ["год кот", "日 本", "été"]
    for kind in ("characters", "words"):
        tokenizer = train_tokenizer(kind, texts)
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_labels_of_several_characters_can_be_decoded() -> None:
    tokenizer = CharTokenizer([*LABELS, "<unk>"])
    assert tokenizer.decode([1, len(LABELS), 2]) == "a<unk>b"
    assert tokenizer.missing("ab<c") == ["<"]
