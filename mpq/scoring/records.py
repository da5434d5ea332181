"""A comparison of two systems: word errors and the verdict of the tests, as written to JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq.files import write_json

COMPARISON_FORMAT = "mpq.comparison/1"


@dataclass(frozen=True)
class SystemScore:
    """One system's word errors over the whole corpus, as sclite's Sum row counts them.

    Attributes:
        name: The name of the system in reports.
        wer: (sub + del + ins) / (corr + sub + del); 0 without reference words.
        correct, substitutions, deletions, insertions: The numbers of words.
        sentence_errors: Utterances with at least one error.
    """

    name: str
    wer: float
    correct: int
    substitutions: int
    deletions: int
    insertions: int
    sentence_errors: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "wer": self.wer,
            "corr": self.correct,
            "sub": self.substitutions,
            "del": self.deletions,
            "ins": self.insertions,
            "sentence_errors": self.sentence_errors,
        }


@dataclass(frozen=True)
class MapssweResult:
    """The matched pairs test; differences are (errors of a) - (errors of b) per segment.

    Attributes:
        segments: The number of segments.
        mean, std: The mean of the differences, and their standard deviation (with n - 1).
        z: mean / (std / sqrt(segments)); 0 when the differences are all equal; None without segments.
        p: Exact two-tailed normal probability of z; None without segments.
        p_sctk: The probability as sc_stats prints it (z floored to 0.01); None without segments.
        significant: |z| above the critical value, strictly (1.960 at alpha 0.05, as sc_stats).
        better: "a", "b", or None when not significant.
        note: The reason why there is no verdict, or why to doubt it; else "".
    """

    segments: int
    mean: float
    std: float
    z: float | None
    p: float | None
    p_sctk: float | None
    significant: bool
    better: str | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """`mpq.comparison/1`: two systems on the same utterances; a is the baseline, b the compressed one.

    Attributes:
        alpha: The level of the tests.
        utterances, words: The numbers of utterances and of words in the reference.
        a, b: The systems' scores.
        mapsswe: The matched pairs test.
        mcnemar: {"a_only_wrong", "b_only_wrong", "p", "significant"}: exact binomial test on utterances.
        bootstrap: {"difference", "low", "high", "level", "resamples", "seed"}: WER of b minus WER of a and its
            percentile interval from resampled utterances.
        changed: Utterances whose hypotheses differ: {"utt_id", "ref", "a", "b", "errors_a", "errors_b"} each.
        lossless: b is not significantly worse than a (MAPSSWE).
    """

    alpha: float
    utterances: int
    words: int
    a: SystemScore
    b: SystemScore
    mapsswe: MapssweResult
    mcnemar: dict[str, Any]
    bootstrap: dict[str, Any]
    changed: tuple[dict[str, Any], ...]
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "format": COMPARISON_FORMAT,
            "alpha": self.alpha,
            "utterances": self.utterances,
            "words": self.words,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "mapsswe": self.mapsswe.to_json(),
            "mcnemar": self.mcnemar,
            "bootstrap": self.bootstrap,
            "lossless": self.lossless,
            "changed": list(self.changed),
        }

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())
