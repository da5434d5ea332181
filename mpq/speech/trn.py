"""Transcripts in trn files, as NIST SCTK reads them.

A trn file has one utterance a line, `words ... (utterance-id)`. As in sclite, words are separated by ASCII white space
only (a no-break space does not), and the letters A-Z alone are folded to lower case (`Ä` and `ä` differ); nothing else
is normalised.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpq.errors import MpqError
from mpq.files import read_text, write_text

_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_WORD = re.compile(r"[^ \t\n\v\f\r]+")
_MARKUP = re.compile(r'[{}@;"]')
_UNREADABLE = re.compile("[\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class Trn:
    """A transcript file.

    Attributes:
        path: The file that it was read from, for messages.
        utterances: {utterance id without its parentheses: words}, in the file's order, A-Z folded to a-z in both.
    """

    path: Path
    utterances: dict[str, tuple[str, ...]]


def fold(text: str) -> str:
    """Returns the text with A-Z (nothing else) in lower case, as sclite compares it."""
    return text.translate(_FOLD)


def split_words(text: str) -> tuple[str, ...]:
    """Returns the words of a text: split on ASCII white space only, A-Z folded.

    >>> split_words(" The  CAFÉ\\u00a0bar ")
    ('the', 'cafÉ\\xa0bar')
    """
    return tuple(_WORD.findall(fold(text)))


def read_trn(path: Path) -> Trn:
    """Returns the utterances of a trn file. Empty lines and lines that start with ;; or ** are skipped.

    The id is all from the last "(" to the last ")" of the line. Unlike sclite, a missing final newline loses nothing,
    and what SCTK reads as markup inside words ({ } @ ; " and a trailing *) is refused.

    Raises:
        MpqError: Not such a file, an id twice, or markup in a word; the message names the file and the line.
    """
    utterances: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.startswith((";;", "**")) or not _WORD.search(line):
            continue
        where = f"{path}: line {number}"
        left, right = line.rfind("("), line.rfind(")")
        if not 0 <= left < right - 1 or _WORD.search(line[right + 1 :]):
            raise MpqError(f"{where}: expected words and then an utterance id in parentheses, got {line[-80:]!r}")
        utt_id, words = fold(line[left + 1 : right]), split_words(line[:left])
        if utt_id in lines:
            raise MpqError(f"{where}: the utterance ({utt_id}) is already on line {lines[utt_id]}; keep one of them")
        _check_words(words, where)
        lines[utt_id], utterances[utt_id] = number, words
    return Trn(Path(path), utterances)


def write_trn(path: Path, utt_ids: Sequence[str], texts: Sequence[str]) -> None:
    """Writes a trn file; arguments and errors are those of `format_trn`. Nothing is written if there is an error."""
    write_text(path, format_trn(path, utt_ids, texts))


def format_trn(path: Path, utt_ids: Sequence[str], texts: Sequence[str]) -> str:
    """Returns a trn file that `read_trn` and sclite read as the same words; the case of letters is kept.

    Args:
        path: The file that messages name.
        utt_ids: Ids without parentheses, different from each other even when A-Z are folded.
        texts: The transcript of each, may be empty; white space becomes one space.

    Raises:
        MpqError: An id or a word could not be read back; the message names the utterance.
    """
    lines: list[str] = []
    written: dict[str, str] = {}
    for utt_id, text in zip(utt_ids, texts, strict=True):
        where = f"{path}: utterance {utt_id!r}"
        if not utt_id or re.search(r"[()\n]", utt_id) or _UNREADABLE.search(utt_id):
            raise MpqError(f"{where}: expected an id of one character or more without parentheses or line ends")
        if fold(utt_id) in written:
            other = written[fold(utt_id)]
            raise MpqError(f"{where}: the same id as that of {other!r} (sclite ignores case); rename one of them")
        written[fold(utt_id)] = utt_id
        words = _WORD.findall(text)
        _check_words(words, where)
        line = " ".join([*words, f"({utt_id})"])
        if line.startswith("**"):
            raise MpqError(f"{where}: the first word {words[0]!r} starts with **, a comment in trn; remove it")
        lines.append(line + "\n")
    return "".join(lines)


def escape_markup(text: str) -> str:
    """Returns a hypothesis with U+FFFD for each character that SCTK would read as markup.

    No reference has such characters (`trn_fault`), so a word with one is an error before and after.

    >>> escape_markup('so "far* @') == "so \ufffdfar\ufffd \ufffd"
    True
    """
    words = (re.sub(r"(?<=.)\*$", "\ufffd", word) for word in _WORD.findall(text))
    return _UNREADABLE.sub("\ufffd", _MARKUP.sub("\ufffd", re.sub(r"^\*\*", "\ufffd", " ".join(words))))


def trn_fault(text: str) -> str | None:
    """Returns why a transcript cannot stand in a trn file; None when it can."""
    try:
        format_trn(Path("trn"), ["id"], [text])
    except MpqError as error:
        return str(error).removeprefix("trn: utterance 'id': ")
    return None


def _check_words(words: Sequence[str], where: str) -> None:
    for word in words:
        if match := _MARKUP.search(word):
            raise MpqError(f"{where}: the word {word!r} holds {match[0]}, which SCTK reads as markup; remove it")
        if len(word) > 1 and word.endswith("*"):
            raise MpqError(f"{where}: the word {word!r} ends in *, which SCTK strips; remove it")
        if match := _UNREADABLE.search(word):
            raise MpqError(f"{where}: the word {word!r} holds U+{ord(match[0]):04X}, which is no letter; remove it")
