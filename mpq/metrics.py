"""Transcripts and word errors: trn files as NIST SCTK reads them, and what `mpq evaluate` counts.

A trn file has one utterance a line, `words ... (utterance-id)`. As in sclite, words are separated by ASCII white space
only (a no-break space does not), and the letters A-Z alone are folded to lower case (`Ä` and `ä` differ); nothing else
is normalised. Words are counted over sclite's alignment, not jiwer's, so that `evaluate`, `compare` and sclite print
the same numbers. All WERs are fractions.
"""

import math
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.files import read_text, write_text
from mpq.scores import SystemScore
from mpq.significance import align, count_errors

METRICS_FORMAT = "mpq.metrics/1"

LENGTH_EDGES_SECONDS = (0.0, 2.0, 5.0, 10.0, 20.0)
"""Lower edges of the durations that `Metrics.by_length` tells apart; the last bucket has no upper edge."""

LOOP_MAX_WORDS, LOOP_MIN_TIMES = 4, 4
"""A loop is an n-gram of up to so many words, at least so many times in a row."""

_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_WORD = re.compile(r"[^ \t\n\v\f\r]+")
_MARKUP = re.compile(r'[{}@;"]')
_UNREADABLE = re.compile("[\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class Trn:
    """A transcript file.

    Attributes:
        path: Where it came from, for messages.
        utterances: {utterance id without its parentheses: words}, in the file's order, A-Z folded to a-z in both.
    """

    path: Path
    utterances: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class LengthBucket:
    """The utterances of min_seconds <= duration < max_seconds (None: no upper limit)."""

    min_seconds: float
    max_seconds: float | None
    utterances: int
    words: int
    errors: int
    wer: float


@dataclass(frozen=True)
class Metrics:
    """`mpq.metrics/1`: the word errors of one system on one test set.

    Attributes:
        wer: (substitutions + deletions + insertions) / words; 0 without reference words.
        correct, substitutions, deletions, insertions: Words.
        words: Of the reference.
        utterances: All of them.
        sentence_errors: Utterances with at least one error.
        empty_outputs: Utterances with an empty hypothesis although the reference has words.
        loop_outputs: Utterances in whose hypothesis some n-gram of 1 to 4 words stands 4 or more times in a row, and
            not so in the reference: a decoder that repeats itself.
        by_length: The same WER by duration; buckets without utterances are left out.
        audio_seconds: Sum of the durations.
    """

    wer: float
    correct: int
    substitutions: int
    deletions: int
    insertions: int
    words: int
    utterances: int
    sentence_errors: int
    empty_outputs: int
    loop_outputs: int
    by_length: tuple[LengthBucket, ...]
    audio_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "format": METRICS_FORMAT,
            "wer": self.wer,
            "corr": self.correct,
            "sub": self.substitutions,
            "del": self.deletions,
            "ins": self.insertions,
            "words": self.words,
            "utterances": self.utterances,
            "sentence_errors": self.sentence_errors,
            "empty_outputs": self.empty_outputs,
            "loop_outputs": self.loop_outputs,
            "by_length": [asdict(bucket) for bucket in self.by_length],
            "audio_seconds": self.audio_seconds,
        }


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
        path: What messages name.
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


def score(name: str, alignments: Sequence[str]) -> SystemScore:
    """Returns one system's word errors, from the alignment of every utterance (see `significance.align`)."""
    letters = "".join(alignments)
    return SystemScore(
        name=name,
        wer=_word_error_rate(count_errors(letters), len(letters) - letters.count("I")),
        correct=letters.count("C"),
        substitutions=letters.count("S"),
        deletions=letters.count("D"),
        insertions=letters.count("I"),
        sentence_errors=sum(count_errors(alignment) > 0 for alignment in alignments),
    )


def measure(
    utt_ids: Sequence[str], references: Sequence[str], hypotheses: Sequence[str], durations_seconds: Sequence[float]
) -> Metrics:
    """Returns the word errors of a test set, from the texts and durations of its utterances.

    Args:
        utt_ids: Only for messages.
        references, hypotheses: Texts; split and folded as in a trn file.
        durations_seconds: Of the audio.

    Raises:
        MpqError: A duration that is negative or not finite; the message names the utterance.
    """
    for utt_id, seconds in zip(utt_ids, durations_seconds, strict=True):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise MpqError(f"utterance {utt_id!r}: duration: expected 0 seconds or more, got {seconds}")
    pairs = [(split_words(ref), split_words(hyp)) for ref, hyp in zip(references, hypotheses, strict=True)]
    alignments = [align(reference, hypothesis) for reference, hypothesis in pairs]

    by_length = []
    for low, high in zip(LENGTH_EDGES_SECONDS, (*LENGTH_EDGES_SECONDS[1:], math.inf), strict=True):
        inside = [
            alignment for alignment, seconds in zip(alignments, durations_seconds, strict=True) if low <= seconds < high
        ]
        if inside:
            errors = sum(map(count_errors, inside))
            words = sum(len(alignment) - alignment.count("I") for alignment in inside)
            max_seconds = None if high == math.inf else high
            by_length.append(
                LengthBucket(low, max_seconds, len(inside), words, errors, _word_error_rate(errors, words))
            )

    total = score("", alignments)
    return Metrics(
        wer=total.wer,
        correct=total.correct,
        substitutions=total.substitutions,
        deletions=total.deletions,
        insertions=total.insertions,
        words=total.correct + total.substitutions + total.deletions,
        utterances=len(pairs),
        sentence_errors=total.sentence_errors,
        empty_outputs=sum(bool(reference) and not hypothesis for reference, hypothesis in pairs),
        loop_outputs=sum(bool(_loops(hypothesis) - _loops(reference)) for reference, hypothesis in pairs),
        by_length=tuple(by_length),
        audio_seconds=math.fsum(durations_seconds),
    )


def _word_error_rate(errors: int, words: int) -> float:
    return errors / words if words else 0.0


def _loops(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Returns the n-grams of 1 to 4 words that stand 4 or more times in a row."""
    found = set()
    for n in range(1, LOOP_MAX_WORDS + 1):
        times = LOOP_MIN_TIMES - 1
        for start in range(len(words) - n * LOOP_MIN_TIMES + 1):
            # Equal to itself shifted by one period: the n-gram and `times` further copies of it.
            if words[start : start + n * times] == words[start + n : start + n * (times + 1)]:
                found.add(words[start : start + n])
    return found


def _check_words(words: Sequence[str], where: str) -> None:
    for word in words:
        if match := _MARKUP.search(word):
            raise MpqError(f"{where}: the word {word!r} holds {match[0]}, which SCTK reads as markup; remove it")
        if len(word) > 1 and word.endswith("*"):
            raise MpqError(f"{where}: the word {word!r} ends in *, which SCTK strips; remove it")
        if match := _UNREADABLE.search(word):
            raise MpqError(f"{where}: the word {word!r} holds U+{ord(match[0]):04X}, which is no letter; remove it")
