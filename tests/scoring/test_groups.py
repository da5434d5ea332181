"""Groups of utterances: the keys that an evaluation keeps, and each group's own numbers and test."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.scoring.groups import Labels, Scored, compare_groups, read_labels, write_keys
from mpq.scoring.significance import mapsswe
from mpq.speech.manifests import Utterance


def spoken(utt_id: str, speaker: str | None, **others: str) -> Utterance:
    return replace(Utterance(utt_id, Path("x.wav"), "a", 1.0, None, speaker, "x:1"), others=tuple(others.items()))


def test_keys_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.json", [spoken("U1", "s1", room="A"), spoken("u2", None, room="B"), spoken("u3", "s1")])
    assert read_labels(tmp_path, "speaker") == Labels("speaker", {"u1": "s1", "u3": "s1"})  # folded as in a trn file
    assert read_labels(tmp_path, "room") == Labels("room", {"u1": "A", "u2": "B"})
    with pytest.raises(MpqError, match=r"keys\.json: no utterance has the key 'lang' .*; there are: room, speaker$"):
        read_labels(tmp_path, "lang")
    write_keys(tmp_path / "keys.json", [spoken("u1", None)])
    with pytest.raises(MpqError, match="there is none to group by"):
        read_labels(tmp_path, "speaker")


@pytest.mark.parametrize("content", [{}, {"utterances": {"u1": {"speaker": 1}}}, {"utterances": ["u1"]}])
def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path, content: dict) -> None:
    with pytest.raises(MpqError, match=r"keys\.json: no such file; .*run mpq evaluate again"):
        read_labels(tmp_path, "speaker")
    (tmp_path / "keys.json").write_text(json.dumps({"format": "mpq.keys/1", **content}))
    with pytest.raises(MpqError, match=r"keys\.json: utterances"):
        read_labels(tmp_path, "speaker")
    (tmp_path / "keys.json").write_text(json.dumps({"format": "mpq.metrics/1", **content}))
    with pytest.raises(MpqError, match=r'expected "mpq\.keys/1"'):
        read_labels(tmp_path, "speaker")


def utterance(*segments: tuple[int, int], words: int = 100) -> Scored:
    return Scored(words, sum(a for a, _ in segments), sum(b for _, b in segments), list(segments))


EVEN = utterance(*[(1, 0), (0, 1)] * 20)
"""40 segments, 20 errors of each."""
WORSE = utterance(*[(1, 0)] * 10 + [(0, 1)] * 26)
"""36 segments, 10 errors of a and 26 of b: d has the mean -16 / 36, z -2.94, p 0.0033."""
SMALL = utterance(*[(0, 1)] * 28 + [(1, 0)])
"""29 segments: one too few, however clear."""


def test_the_worst_group_is_named_and_small_ones_are_not_judged() -> None:
    scored = {"u1": EVEN, "u2": WORSE, "u3": SMALL, "u4": utterance(words=10), "u5": utterance((1, 1), words=0)}
    labels = Labels("speaker", {"u1": "even", "u2": "worse", "u3": "small", "u4": "silent", "u5": "wordless"})
    found = compare_groups(labels, scored, alpha=0.05)
    assert [one.name for one in found.groups] == ["small", "worse", "even", "silent", "wordless"]
    assert found.worst == "worse"
    assert {one.name for one in found.groups if one.too_small} == {"small", "silent", "wordless"}
    by_name = {one.name: one for one in found.groups}
    assert {name for name, one in by_name.items() if one.worse} == {"worse"}
    p = mapsswe(WORSE.segments).p
    assert (
        p == pytest.approx(0.0033, abs=2e-4) and by_name["worse"].p == 2 * p and by_name["even"].p == 1.0
    )  # Holm of two
    assert (by_name["worse"].wer_a, by_name["worse"].wer_b, by_name["worse"].segments) == (0.1, 0.26, 36)
    assert by_name["small"].p is None and by_name["small"].upper is not None
    assert by_name["silent"].upper is None and by_name["wordless"].upper is None


def test_with_many_groups_chance_alone_makes_none_worse() -> None:
    """A p of 0.003335 counts among 14 groups (0.0467), not among 15 (0.05002)."""
    for others, is_worse in ((13, True), (14, False)):
        scored = {"w": WORSE} | {f"e{i}": EVEN for i in range(others)}
        found = compare_groups(Labels("k", {utt_id: utt_id for utt_id in scored}), scored, alpha=0.05)
        assert [one.worse for one in found.groups] == [is_worse] + [False] * others and found.worst == "w"


def test_a_group_that_is_better_is_not_worse() -> None:
    better = utterance(*[(b, a) for a, b in WORSE.segments])
    found = compare_groups(Labels("k", {"u": "better"}), {"u": better}, alpha=0.05)
    assert found.worst == "better" and not found.groups[0].worse and (found.groups[0].p or 1) < 0.05


def test_utterances_are_pooled_and_those_without_the_key_stay_apart() -> None:
    labels = Labels("k", {"u1": "x", "u2": "x"})
    found = compare_groups(labels, {"u1": EVEN, "u2": WORSE, "u3": WORSE}, alpha=0.05)
    assert [(one.name, one.utterances, one.words, one.segments) for one in found.groups] == [
        (None, 1, 100, 36),
        ("x", 2, 200, 76),
    ]
    assert found.worst == "x"  # the rest is no group
    assert compare_groups(labels, {}, alpha=0.05).groups == ()
