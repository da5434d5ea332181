"""Two systems on the same utterances: `mpq compare`. The tests themselves are in `mpq.scoring.significance`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.files import read_json
from mpq.scoring.groups import Labels, Scored, compare_groups
from mpq.scoring.metrics import METRICS_FORMAT, score
from mpq.scoring.records import Comparison, Comparisons
from mpq.scoring.significance import align, bootstrap, count_errors, mapsswe, mcnemar, segments
from mpq.scoring.verdicts import MARGIN, detectable, holm, non_inferiority
from mpq.speech.trn import Trn, read_trn

SHOWN_IDS = 3
"""Utterance ids that an error message lists before it says "...". """


def compare(
    ref: Trn,
    a: Trn,
    b: Trn,
    names: tuple[str, str] = ("a", "b"),
    alpha: float = 0.05,
    resamples: int = 10_000,
    seed: int = 0,
    margin: float = MARGIN,
    labels: Labels | None = None,
) -> Comparison:
    """Returns word errors, significance tests and the changed utterances of two systems; a is the baseline.

    Unlike SCTK, which scores what it finds, all three files must hold the same utterances (in any order).

    Args:
        ref: The reference transcripts.
        a, b: The two systems' transcripts.
        names: The names of the systems in reports.
        alpha: The level of all tests and intervals.
        resamples, seed: The number of the bootstrap's resamples, and its seed.
        margin: The loss that is put up with, a fraction of a word error rate.
        labels: The groups to tell apart; None for none.

    Raises:
        MpqError: The utterances differ, there are none, or an option is out of range.
    """
    _check_same_ids(ref, a, b)
    alignments_a = [align(words, a.utterances[utt_id]) for utt_id, words in ref.utterances.items()]
    alignments_b = [align(words, b.utterances[utt_id]) for utt_id, words in ref.utterances.items()]
    errors_a, errors_b = list(map(count_errors, alignments_a)), list(map(count_errors, alignments_b))
    found = [segments(*both) for both in zip(alignments_a, alignments_b, strict=True)]
    pairs = [pair for of_utterance in found for pair in of_utterance]
    assert sum(pair[0] for pair in pairs) == sum(errors_a), "segments must hold every error of a once"
    assert sum(pair[1] for pair in pairs) == sum(errors_b), "segments must hold every error of b once"

    test = mapsswe(pairs, alpha)
    word_counts = [len(words) for words in ref.utterances.values()]
    errors = list(zip(errors_a, errors_b, strict=True))
    scored = map(Scored, word_counts, errors_a, errors_b, found)
    return Comparison(
        alpha=alpha,
        utterances=len(word_counts),
        words=sum(word_counts),
        a=score(names[0], alignments_a),
        b=score(names[1], alignments_b),
        mapsswe=test,
        mcnemar=mcnemar(
            a_only_wrong=sum(of_a > 0 and of_b == 0 for of_a, of_b in errors),
            b_only_wrong=sum(of_b > 0 and of_a == 0 for of_a, of_b in errors),
            alpha=alpha,
        ),
        bootstrap=bootstrap(errors_a, errors_b, word_counts, alpha, resamples, seed),
        changed=tuple(_changed(ref, a, b, errors)),
        lossless=test.better != "a",
        non_inferiority=non_inferiority(pairs, sum(word_counts), margin),
        detectable=detectable(pairs, sum(word_counts), alpha),
        by=None if labels is None else compare_groups(labels, dict(zip(ref.utterances, scored, strict=True)), alpha),
    )


def combine(comparisons: Sequence[Comparison]) -> Comparisons:
    """Returns the verdict on several test sets: their MAPSSWE tests together keep the level (Holm).

    Args:
        comparisons: One of each test set, all at the same level; at least one.
    """
    p = holm([1.0 if one.mapsswe.p is None else one.mapsswe.p for one in comparisons])
    return Comparisons(
        sets=tuple(comparisons),
        p=tuple(p),
        lossless=not any(q < one.alpha and one.mapsswe.better == "a" for q, one in zip(p, comparisons, strict=True)),
        non_inferior=all(one.non_inferiority.non_inferior for one in comparisons),
    )


def _changed(ref: Trn, a: Trn, b: Trn, errors: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Returns the utterances whose outputs differ, with their (errors of a, errors of b)."""
    return [
        {
            "utt_id": utt_id,
            "ref": " ".join(words),
            "a": " ".join(a.utterances[utt_id]),
            "b": " ".join(b.utterances[utt_id]),
            "errors_a": of_a,
            "errors_b": of_b,
        }
        for (utt_id, words), (of_a, of_b) in zip(ref.utterances.items(), errors, strict=True)
        if a.utterances[utt_id] != b.utterances[utt_id]
    ]


def read_evaluations(folder_a: Path, folder_b: Path) -> tuple[Trn, Trn, Trn]:
    """Returns the reference and the hypotheses of two folders that `mpq evaluate` wrote, as `compare` takes them.

    Raises:
        MpqError: Not such folders, an evaluation that did not finish, or two evaluations of different references.
    """
    (ref, a), (other_ref, b) = _read_evaluation(Path(folder_a)), _read_evaluation(Path(folder_b))
    for utt_id in [*ref.utterances, *other_ref.utterances]:
        words, other_words = ref.utterances.get(utt_id), other_ref.utterances.get(utt_id)
        if words != other_words:
            raise MpqError(
                f"{other_ref.path}: utterance ({utt_id}): expected the same reference as in {ref.path}, "
                f"{_quote(words)}, got {_quote(other_words)}; evaluate both systems on the same data"
            )
    return ref, a, b


def _read_evaluation(folder: Path) -> tuple[Trn, Trn]:
    """Returns the reference and the system's transcripts of a folder."""
    if not folder.is_dir():
        raise MpqError(f"{folder}: no such folder; expected one that mpq evaluate wrote")
    if not (folder / "metrics.json").is_file():  # the last file that evaluate writes
        raise MpqError(f"{folder}: metrics.json is missing: this evaluation did not finish; run mpq evaluate again")
    read_json(folder / "metrics.json", METRICS_FORMAT)
    return read_trn(folder / "ref.trn"), read_trn(folder / "hyp.trn")


def _check_same_ids(ref: Trn, *systems: Trn) -> None:
    """Refuses transcripts of other utterances than the reference's."""
    faults = []
    for system in systems:
        missing = [utt_id for utt_id in ref.utterances if utt_id not in system.utterances]
        extra = [utt_id for utt_id in system.utterances if utt_id not in ref.utterances]
        if missing:
            faults.append(f"{system.path}: {len(missing)} utterances of {ref.path} are missing: {_shorten(missing)}")
        if extra:
            faults.append(f"{system.path}: {len(extra)} utterances are not in {ref.path}: {_shorten(extra)}")
    if faults:
        raise MpqError("; ".join([*faults, "all files must hold the same utterances"]))
    if not ref.utterances:
        raise MpqError(f"{ref.path}: expected at least one utterance, got none")


def _shorten(utt_ids: list[str]) -> str:
    return ", ".join(f"({utt_id})" for utt_id in utt_ids[:SHOWN_IDS]) + (", ..." if len(utt_ids) > SHOWN_IDS else "")


def _quote(words: tuple[str, ...] | None) -> str:
    return "no such utterance" if words is None else repr(" ".join(words)[:80])
