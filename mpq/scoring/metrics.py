"""The word errors that `mpq evaluate` counts.

Words are counted over sclite's alignment, not jiwer's, so that `evaluate`, `compare` and sclite print the same numbers.
All WERs are fractions.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpq.errors import MpqError
from mpq.scoring.records import SystemScore
from mpq.scoring.significance import align, count_errors
from mpq.speech.trn import split_words

METRICS_FORMAT = "mpq.metrics/1"

LENGTH_EDGES_SECONDS = (0.0, 2.0, 5.0, 10.0, 20.0)
"""Lower edges of the durations that `Metrics.by_length` tells apart; the last bucket has no upper edge."""

LOOP_MAX_WORDS, LOOP_MIN_TIMES = 4, 4
"""A loop is an n-gram of up to so many words, at least so many times in a row."""


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
        correct, substitutions, deletions, insertions: The numbers of words.
        words: The number of words of the reference.
        utterances: The number of utterances.
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
        utt_ids: The names of the utterances, for messages.
        references, hypotheses: The texts; they are split and folded as in a trn file.
        durations_seconds: The duration of each utterance.

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
