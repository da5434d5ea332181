"""Transcript <-> tokens: characters, words and SentencePiece models behind one small interface; made from transcripts.

Legend: U tokens of one utterance, V vocabulary without the CTC blank.
"""

import io
import lzma
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from mpq.errors import MpqError


class Tokenizer(ABC):
    """Turns a transcript into token ids and back. Ids are 0 .. V-1; the CTC blank is not among them."""

    pieces: tuple[str, ...]
    """The V tokens, as the vocabulary spells them."""
    is_closed = False
    """Whether the tokens are words. A test may have other words; a character that is missing is a fault of the text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the U token ids of a transcript.

        Raises:
            MpqError: The text has characters that the vocabulary lacks.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the transcript of U token ids."""

    @abstractmethod
    def missing(self, text: str) -> list[str]:
        """Returns the characters of `text` that no token can spell, each once; words where the tokens are words."""

    @abstractmethod
    def to_config(self) -> tuple[dict[str, Any], bytes]:
        """Returns a JSON object and a blob from which `tokenizer_from_config` makes the same tokenizer."""

    def spelled(self, text: str) -> str:
        """Returns a text without missing characters as the tokens spell it: what a perfect recogniser would output."""
        return text

    def _refuse_missing(self, text: str) -> None:
        if missing := self.missing(text):
            lacks = ", ".join(map(repr, missing))
            raise MpqError(f"text {text!r}: the vocabulary of {len(self.pieces)} tokens lacks {lacks}")


class CharTokenizer(Tokenizer):
    """One token a character, in the order of the model's labels; longer labels can be decoded, not encoded."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.pieces = tuple(labels)
        self._ids = {label: token for token, label in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        self._refuse_missing(text)
        return [self._ids[character] for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in tokens)

    def missing(self, text: str) -> list[str]:
        return list(dict.fromkeys(character for character in text if character not in self._ids))

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        return {"type": "characters", "labels": list(self.pieces)}, b""


class WordTokenizer(Tokenizer):
    """One token a word: for closed vocabularies such as digits and commands. Words are separated by spaces."""

    is_closed = True

    def __init__(self, words: Sequence[str]) -> None:
        self.pieces = tuple(words)
        self._ids = {word: token for token, word in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        self._refuse_missing(text)
        return [self._ids[word] for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.pieces[token] for token in tokens)

    def spelled(self, text: str) -> str:
        return " ".join(text.split())

    def missing(self, text: str) -> list[str]:
        return list(dict.fromkeys(word for word in text.split() if word not in self._ids))

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        return {"type": "words", "words": list(self.pieces)}, b""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: BPE or unigram pieces, with its own text normalisation.

    Args:
        model: The bytes of a `.model` file.

    Raises:
        MpqError: The bytes are not a SentencePiece model.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise MpqError(f"tokenizer: not a SentencePiece model ({error})") from None
        self.pieces = tuple(self._processor.id_to_piece(list(range(self._processor.get_piece_size()))))

    def encode(self, text: str) -> list[int]:
        self._refuse_missing(text)
        return list(map(int, self._processor.encode(text)))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._processor.decode(list(tokens)))

    def spelled(self, text: str) -> str:
        return self.decode(self.encode(text))

    def missing(self, text: str) -> list[str]:
        unknown = self._processor.unk_id()
        pieces = self._processor.encode(text, out_type=str)  # an unknown piece is the text itself
        missing = "".join(piece for piece in pieces if self._processor.piece_to_id(piece) == unknown)
        return list(dict.fromkeys(missing.replace("\u2581", "")))

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        return {"type": "sentencepiece"}, lzma.compress(self.model, preset=9)


def train_tokenizer(kind: str, texts: Iterable[str], vocabulary_size: int | None = None) -> Tokenizer:
    """Returns a tokenizer whose vocabulary is that of the transcripts.

    Args:
        kind: "characters", "words", or "bpe": a SentencePiece model trained on the transcripts.
        texts: The transcripts.
        vocabulary_size: V, for "bpe" alone.

    Raises:
        MpqError: No text has a word, or SentencePiece cannot make a vocabulary of that size; the message has the
            sizes that it can.
    """
    texts = [" ".join(text.split()) for text in texts]
    if not any(texts):
        raise MpqError("tokens: the transcripts have no words to make a vocabulary from")
    if kind == "characters":
        return CharTokenizer(sorted({character for text in texts for character in text}))
    if kind == "words":
        return WordTokenizer(sorted({word for text in texts for word in text.split()}))
    assert kind == "bpe" and vocabulary_size
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            character_coverage=1.0,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # so that the same transcripts give the same pieces
            minloglevel=2,
        )
    except RuntimeError as error:
        raise MpqError(f"tokens: bpe of {vocabulary_size}: {' '.join(str(error).split())}") from None
    return SentencePieceTokenizer(model.getvalue())


def tokenizer_from_config(config: dict[str, Any], blob: bytes) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.to_config` described.

    Raises:
        MpqError: The type is not known to this version.
    """
    if config["type"] == "characters":
        return CharTokenizer(config["labels"])
    if config["type"] == "words":
        return WordTokenizer(config["words"])
    if config["type"] == "sentencepiece":
        return SentencePieceTokenizer(lzma.decompress(blob))
    raise MpqError(f"tokenizer type: expected characters, words or sentencepiece, got {config['type']!r}")
