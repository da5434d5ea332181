"""What a person reads of a comparison: the verdict, what the test set can show, several test sets, groups."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from tiny_cli import fails, result_json, run

from mpq.cli.comparisons import changes_view, comparison_view, comparisons_view, groups_view
from mpq.files import write_json
from mpq.scoring.compare import combine, compare
from mpq.scoring.groups import KEYS_FORMAT
from mpq.scoring.metrics import measure
from mpq.scoring.records import Group, Groups
from mpq.speech.trn import Trn, write_trn


def shown(view: RenderableType) -> str:
    out = Console(width=160, highlight=False, markup=False, emoji=False)
    with out.capture() as capture:
        out.print(view)
    return capture.get()


def trn(name: str, *texts: str) -> Trn:
    return Trn(Path(name), {f"u{index}": tuple(text.split()) for index, text in enumerate(texts)})


@pytest.mark.parametrize("times, verdict", [(1, "lossless: not significantly worse"), (40, "NOT lossless: sign")])
def test_a_comparison_gives_the_verdict_and_the_worst_changes(times: int, verdict: str) -> None:
    ref = trn("ref", *["one two three four"] * times, "a b c")
    worse = trn("b", *["one", "one two x four"] * (times // 2), *["one two three"] * (times % 2), "a b c")
    result = compare(ref, ref, worse, names=("fp32", "small"), resamples=10)
    text = shown(comparison_view(result))
    assert f"small against fp32: {verdict}" in text and f"{times + 1} utterances" in text
    assert f"{times} outputs differ" in text
    text = shown(changes_view(result, most=1))
    assert f"Changed outputs, 1 of {times}:" in text and ("0 -> 3" if times > 1 else "0 -> 1") in text


REF = trn("ref", *["one two three four"] * 100)
A = trn("a", *["one two three"] * 4, *["one two three four"] * 96)
B = trn("b", *["one two three four"] * 94, *["one two three"] * 6)
"""400 words; a has 4 segments of an error, b 6 others."""


def test_what_the_test_set_can_show_is_said_in_sentences() -> None:
    # S = 2, V = 10, g = 2 / 10: k = 1.645 sqrt(10 + 0.2 k) = 5.480; v = 8, g = 1: k = 2.802 sqrt(8 + k) = 12.771
    text = shown(comparison_view(compare(REF, A, B, resamples=10)))
    assert (
        "With 95 % confidence it is at most 1.87 points worse: NOT shown to be within the margin of 0.2 points.\n"
        in text
    )
    assert "This test set would show a loss of 3.19 points or more four times in five.\n" in text
    text = shown(comparison_view(compare(REF, A, B, resamples=10, margin=0.02)))
    assert "at most 1.87 points worse: within the margin of 2 points (non-inferior).\n" in text
    most = trn("a", *["one two"] * 50, *["one two three four"] * 50)
    text = shown(comparison_view(compare(REF, most, B, resamples=10)))
    assert "it is at least 17.60 points better: within the margin" in text  # 94 - 1.645 sqrt(50 * 4 + 6) = 70.39


def test_where_nothing_can_be_said_the_reason_is_given() -> None:
    for ref, a, b, why in (
        (REF, REF, REF, "no errors in either system: nothing to test"),
        (REF, A, A, "all 4 segments differ by +0 errors"),
        (trn("r", ""), trn("a", "x"), trn("b", "x y"), "the reference has no words"),
    ):
        text = shown(comparison_view(compare(ref, a, b, resamples=10)))
        assert "How much worse it may be, and whether within the margin of 0.2 points, cannot be said: " in text
        assert why in text and "would show" not in text


def test_several_test_sets() -> None:
    one = compare(REF, A, B, names=("fp32/x", "small/x"), resamples=10)
    same = compare(REF, A, A, names=("fp32/y", "small/y"), resamples=10)
    text = shown(comparisons_view(combine([one, same])))
    assert "All 2 test sets: lossless: not significantly worse on any (MAPSSWE, Holm, alpha 0.05)" in text
    assert "small/x" in text and "1.87" in text and "3.19" in text
    assert "NOT shown to be within the margin of 0.2 points on every test set." in text
    worse = compare(REF, REF, trn("b", *["one", "one two three"] * 50), names=("fp32/z", "small/z"), resamples=10)
    text = shown(comparisons_view(combine([one, worse])))
    assert "NOT lossless: significantly worse on at least one" in text
    text = shown(
        comparisons_view(combine([replace(one, non_inferiority=replace(one.non_inferiority, non_inferior=True))]))
    )
    assert "Shown to be within the margin of 0.2 points on every test set (non-inferior)." in text


def test_groups_name_the_worst_and_mark_the_small() -> None:
    large = Group("s1", 20, 400, 0.04, 0.08, 40, 0.05, 0.03, False, 0.01, True)
    small = Group(None, 2, 10, 0.0, 0.5, 2, None, None, True, None, False)
    text = shown(groups_view(Groups("speaker", "s1", (small, large)), 0.05))
    assert "By speaker: 1 of 1 groups that can be tested are significantly worse" in text
    assert "(no speaker)" in text and "too small to tell" in text and "Worst: s1, +4.00 points." in text
    assert "1 of 2 groups have too few errors to tell (below 30 segments)." in text
    text = shown(groups_view(Groups("speaker", None, (small,)), 0.05))
    assert "0 of 0 groups" in text and "Worst" not in text


# ---- the command


def evaluation(folder: Path, hypotheses: Trn) -> Path:
    """What `mpq evaluate` leaves of REF; the first half is spoken by s1, the other by s2."""
    folder.mkdir(parents=True)
    ids = list(REF.utterances)
    texts = [[" ".join(system.utterances[utt_id]) for utt_id in ids] for system in (REF, hypotheses)]
    for name, lines in zip(("ref.trn", "hyp.trn"), texts, strict=True):
        write_trn(folder / name, ids, lines)
    speakers = {utt_id: {"speaker": f"s{1 + (index >= 50)}"} for index, utt_id in enumerate(ids)}
    write_json(folder / "keys.json", {"format": KEYS_FORMAT, "utterances": speakers})
    write_json(folder / "metrics.json", measure(ids, *texts, [1.0] * len(ids)).to_json())
    return folder


def test_pairs_of_folders_a_margin_and_groups(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name, system) for name, system in (("a", A), ("b", B), ("c", A), ("d", A))]
    one = result_json("compare", *folders[:2], "--margin", "2", "--by", "speaker")
    assert one["non_inferiority"]["margin"] == 0.02 and one["non_inferiority"]["non_inferior"]
    assert one["non_inferiority"]["upper"] == pytest.approx(0.0187, abs=1e-4)
    assert one["detectable"] == pytest.approx(0.0319, abs=1e-4)
    assert [(group["name"], group["too_small"]) for group in one["by"]["groups"]] == [("s2", True), ("s1", True)]
    several = result_json("compare", *folders, "--out", tmp_path / "all.json")
    assert several == json.loads((tmp_path / "all.json").read_text())
    assert [found["b"]["name"] for found in several["sets"]] == [str(folders[1]), str(folders[3])]
    assert several["lossless"] and several["p"][1] == 1.0
    done = run("compare", *folders, "--by", "speaker", "--changes", "1")
    assert done.exit_code == 0 and done.stdout.count("By speaker") == 2 and "All 2 test sets" in done.stdout


def test_what_is_refused(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", A), evaluation(tmp_path / "b", B)
    fails("compare", a, b, a, words="two for each test set")
    fails("compare", words="expected two folders")
    trns = ["--ref", a / "ref.trn", "--a", a / "hyp.trn", "--b", b / "hyp.trn"]
    fails("compare", *trns, "--by", "speaker", words="without --by")
    fails("compare", a, b, "--by", "room", words="no utterance has the key 'room'")
    for margin in ("-1", "nan", "101"):
        fails("compare", a, b, "--margin", margin, words="margin: expected a word error rate from 0 to 1")
    (a / "keys.json").unlink()
    fails("compare", a, b, "--by", "speaker", words="run mpq evaluate again")
    assert run("compare", a, b).exit_code == 0  # an older folder
