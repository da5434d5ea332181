"""A SentencePiece model <-> few bytes: its table of characters is left out where it is one that SentencePiece has.

Nine tenths of a small SentencePiece model are the table of a normalisation rule (which characters become which others),
and nearly all models have one of the four that the library itself builds. Such a table is named, with its fingerprint.

The bytes: rule, 0; the version of SentencePiece, 0; the place of the table in the model (4 bytes, little-endian); the
first 8 bytes of the table's SHA-256; the model without it, as a stream of LZMA2. Without a known table the rule is
empty, and the model follows its 0.
"""

import hashlib
import lzma

import sentencepiece

from mpq.artifact.compression import compressed, decompressed
from mpq.errors import MpqError

RULES = ("nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf")
"""The rules of SentencePiece that have tables."""
_LARGEST = 1 << 28
"""Bytes of a tokenizer."""


def encode_tokenizer(blob: bytes) -> bytes:
    """Returns the bytes of a tokenizer.

    Args:
        blob: What `AsrModel.to_config` returned: an xz-compressed SentencePiece model, or nothing.
    """
    if not blob:
        return b""
    model = lzma.decompress(blob)
    for rule in RULES:
        table = _table(rule)
        at = model.find(table)
        if at > 0:
            start = f"{rule}\0{sentencepiece.__version__}\0".encode() + at.to_bytes(4, "little") + _fingerprint(table)
            return start + compressed(model[:at] + model[at + len(table) :])
    return b"\0" + compressed(model)


def decode_tokenizer(data: bytes) -> bytes:
    """Returns a blob for `AsrModel.from_config` with the SentencePiece model that `encode_tokenizer` was given.

    Raises:
        MpqError: The bytes are damaged, or SentencePiece has another table than when they were written.
    """
    if not data:
        return b""
    name, _, rest = data.partition(b"\0")
    if not name:
        return lzma.compress(decompressed(rest, _LARGEST), preset=0)
    version, _, rest = rest.partition(b"\0")
    rule, at, fingerprint = name.decode(errors="replace"), int.from_bytes(rest[:4], "little"), rest[4:12]
    if rule not in RULES:
        raise MpqError(f"tokenizer: expected a rule among {', '.join(RULES)}, got {rule[:20]!r}: the file is damaged")
    table = _table(rule)
    if _fingerprint(table) != fingerprint:
        raise MpqError(
            f"tokenizer: SentencePiece {sentencepiece.__version__} has another table {rule} than the file was written "
            f"with; install sentencepiece {version[:20].decode(errors='replace')}"
        )
    model = decompressed(rest[12:], _LARGEST)
    return lzma.compress(model[:at] + table + model[at:], preset=0)


def _table(rule: str) -> bytes:
    """Returns the table of a rule, as SentencePiece builds it: a field (number 2, of bytes) after the rule's name."""
    message: bytes = sentencepiece.SentencePieceNormalizer(rule_name=rule).serialized_model_proto()
    start = message.index(rule.encode()) + len(rule)
    assert message[start] == 2 << 3 | 2
    size = sum((message[start + 1 + i] & 127) << 7 * i for i in range(3))  # protobuf's varint, here of three bytes
    return message[start + 4 : start + 4 + size]


def _fingerprint(table: bytes) -> bytes:
    return hashlib.sha256(table).digest()[:8]
