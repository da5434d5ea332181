"""Tokenizers in few bytes, which give back the very same model."""

import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import sentencepiece_model
from tiny_training import TEXTS

from mpq.artifact.tokenizer import decode_tokenizer, encode_tokenizer
from mpq.errors import MpqError
from mpq.speech.text import SentencePieceTokenizer, train_tokenizer

BLOB = train_tokenizer("bpe", TEXTS, 9).to_config()[1]
MODEL = lzma.decompress(BLOB)
STORED = encode_tokenizer(BLOB)


def test_a_round_trip_gives_the_same_bytes() -> None:
    assert lzma.decompress(decode_tokenizer(STORED)) == MODEL
    assert len(STORED) < 0.45 * len(BLOB)


def test_a_vocabulary_without_a_model_takes_nothing() -> None:
    assert encode_tokenizer(b"") == decode_tokenizer(b"") == b""


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity"])
def test_every_rule_of_sentencepiece(rule: str) -> None:
    model = sentencepiece_model(rule)
    data = encode_tokenizer(lzma.compress(model))
    assert lzma.decompress(decode_tokenizer(data)) == model
    assert len(data) < 32_000 and (data[:4] == bytes(4)) == (rule == "identity")


@pytest.mark.parametrize(
    "model", [b"", b"no model", bytes(range(256)), MODEL[:-1], MODEL[:5000], b"\x1a\x06\x12\x04\0\0\0\0"]
)
def test_what_is_no_whole_model_comes_back_too(model: bytes) -> None:
    assert lzma.decompress(decode_tokenizer(encode_tokenizer(lzma.compress(model)))) == model


@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damage_is_refused_or_gives_another_model(place: int, value: int, is_cut: bool) -> None:
    data = bytearray(STORED)
    if is_cut:
        del data[1 + place % (len(data) - 1) :]
    else:
        data[place % len(data)] ^= value
    try:
        found = decode_tokenizer(bytes(data))
        assert found and not is_cut
    except MpqError as error:
        assert "damaged" in str(error)


def test_the_model_works() -> None:
    found = SentencePieceTokenizer(lzma.decompress(decode_tokenizer(STORED)))
    assert [found.decode(found.encode(text)) for text in TEXTS] == list(TEXTS)
