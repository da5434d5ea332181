"""Comparisons of two systems: word errors and the verdict of the tests, as written to JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq.files import write_json

COMPARISON_FORMAT = "mpq.comparison/1"
COMPARISONS_FORMAT = "mpq.comparisons/1"


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
class NonInferiority:
    """Whether b is shown to lose less than a margin; all are fractions of a word error rate.

    Attributes:
        margin: The loss that is put up with.
        upper: The one-sided 95 % bound of WER(b) - WER(a); None where the test is undefined.
        non_inferior: upper is below the margin.
    """

    margin: float
    upper: float | None
    non_inferior: bool


@dataclass(frozen=True)
class Group:
    """Both systems on the utterances of a group; word error rates, bounds and losses are fractions.

    Attributes:
        name: The value of the key; None for the utterances that lack it.
        utterances, words: The numbers of utterances and of reference words.
        wer_a, wer_b: The word error rates; 0 without reference words.
        segments: The number of MAPSSWE's segments.
        upper, detectable: As in `Comparison`, for this group alone.
        too_small: It has fewer than 30 segments, or they do not vary, and so it is not tested.
        p: The p of MAPSSWE, adjusted for all groups that are tested (Holm); None where it is not tested.
        worse: b is significantly worse here.
    """

    name: str | None
    utterances: int
    words: int
    wer_a: float
    wer_b: float
    segments: int
    upper: float | None
    detectable: float | None
    too_small: bool
    p: float | None
    worse: bool


@dataclass(frozen=True)
class Groups:
    """A comparison by groups of utterances.

    Attributes:
        key: The key of the manifest that says the group.
        worst: The group that loses most (or gains least) of those that are tested; None where none is.
        groups: All groups, those first that lose most.
    """

    key: str
    worst: str | None
    groups: tuple[Group, ...]


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
        non_inferiority: How much worse b is at most, and whether that is below the margin.
        detectable: The loss that the test would find four times in five on this test set, a fraction of a word error
            rate; None where the test is undefined.
        by: The same by groups of utterances; None unless it was asked for.
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
    non_inferiority: NonInferiority
    detectable: float | None
    by: Groups | None = None

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
            "non_inferiority": asdict(self.non_inferiority),
            "detectable": self.detectable,
            "by": None if self.by is None else asdict(self.by),
            "changed": list(self.changed),
        }

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())


@dataclass(frozen=True)
class Comparisons:
    """`mpq.comparisons/1`: the same question on several test sets.

    Attributes:
        sets: The comparison on each test set.
        p: The p of MAPSSWE on each, adjusted for all of them (Holm); 1 where the test is undefined.
        lossless: On no test set is b significantly worse than a, at the level alpha for all tests together.
        non_inferior: b is shown to lose less than the margin on every test set (which needs no adjustment: all have to
            show it).
    """

    sets: tuple[Comparison, ...]
    p: tuple[float, ...]
    lossless: bool
    non_inferior: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "format": COMPARISONS_FORMAT,
            "alpha": self.sets[0].alpha,
            "lossless": self.lossless,
            "non_inferior": self.non_inferior,
            "p": list(self.p),
            "sets": [one.to_json() for one in self.sets],
        }

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())
