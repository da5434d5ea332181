"""Transcript <-> tokens: character lists and SentencePiece models behind one small interface.

Legend: U tokens of one utterance, V vocabulary without the CTC blank.
"""

import lzma
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import sentencepiece

from mpq.errors import MpqError


class Tokenizer(ABC):
    """Turns a transcript into token ids and back. Ids are 0 .. V-1; the CTC blank is not among them."""

    pieces: tuple[str, ...]
    """The V tokens, as the vocabulary spells them."""

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
    def missing_characters(self, text: str) -> str:
        """Returns the characters of `text` that no token can spell, each once, in order; "" when there are none."""

    @abstractmethod
    def to_config(self) -> tuple[dict[str, Any], bytes]:
        """Returns a JSON object and a blob from which `tokenizer_from_config` makes the same tokenizer."""

    def _refuse_missing(self, text: str) -> None:
        if missing := self.missing_characters(text):
            raise MpqError(f"text {text!r}: the vocabulary of {len(self.pieces)} tokens lacks {missing!r}")


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

    def missing_characters(self, text: str) -> str:
        return "".join(dict.fromkeys(character for character in text if character not in self._ids))

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        return {"type": "characters", "labels": list(self.pieces)}, b""


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
        return self._processor.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._processor.decode(list(tokens))

    def missing_characters(self, text: str) -> str:
        unknown = self._processor.unk_id()
        pieces = self._processor.encode(text, out_type=str)  # an unknown piece is the text itself
        missing = "".join(piece for piece in pieces if self._processor.piece_to_id(piece) == unknown)
        return "".join(dict.fromkeys(missing.replace("\u2581", "")))

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        return {"type": "sentencepiece"}, lzma.compress(self.model, preset=9)


def tokenizer_from_config(config: dict[str, Any], blob: bytes) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.to_config` described.

    Raises:
        MpqError: The type is not known to this version.
    """
    if config["type"] == "characters":
        return CharTokenizer(config["labels"])
    if config["type"] == "sentencepiece":
        return SentencePieceTokenizer(lzma.decompress(blob))
    raise MpqError(f"tokenizer type: expected characters or sentencepiece, got {config['type']!r}")
