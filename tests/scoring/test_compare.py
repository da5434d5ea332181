"""Whole comparisons against NIST SCTK, and the faults in the files that a user may bring."""

import json
import random
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.files import write_json
from mpq.scoring.compare import combine, compare, read_evaluations
from mpq.scoring.groups import Labels
from mpq.scoring.metrics import measure
from mpq.speech.trn import Trn, read_trn, write_trn

GOLDEN = Path(__file__).parents[1] / "golden" / "mapsswe"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.json"))


def trns(case):
    return [read_trn(GOLDEN / case / name) for name in ("ref.trn", "hyp_a.trn", "hyp_b.trn")]


def trn(name, **texts):
    return Trn(Path(name), {utt_id: tuple(text.split()) for utt_id, text in texts.items()})


def write_evaluation(folder, references, hypotheses):
    """What `mpq evaluate` leaves: metrics.json last."""
    folder.mkdir()
    utt_ids = [f"u{index}" for index in range(len(references))]
    write_trn(folder / "ref.trn", utt_ids, references)
    write_trn(folder / "hyp.trn", utt_ids, hypotheses)
    write_json(folder / "metrics.json", measure(utt_ids, references, hypotheses, [1.0] * len(utt_ids)).to_json())


@pytest.mark.parametrize("case", CASES)
def test_compare_is_sctk_from_files_to_verdict(case, tmp_path):
    want = json.loads((GOLDEN / case / "expected.json").read_text(encoding="utf-8"))
    compare(*trns(case), names=("base", "small"), resamples=200, seed=1).save(tmp_path / "comparison.json")
    got = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert (got["format"], got["alpha"]) == ("mpq.comparison/1", 0.05)
    assert got["utterances"] == want["systems"]["a"]["utterances"] and got["words"] == want["systems"]["a"]["words"]
    for system, name in [("a", "base"), ("b", "small")]:
        counts = want["systems"][system]
        assert got[system]["name"] == name
        assert got[system]["wer"] == pytest.approx(counts["wer_pct"] / 100, rel=1e-14)
        assert [got[system][key] for key in ("corr", "sub", "del", "ins", "sentence_errors")] == [
            counts[key] for key in ("corr", "sub", "del", "ins", "utt_err")
        ]
    precise = want["mapsswe"]["full_precision"]
    test = got["mapsswe"]
    assert (test["segments"], test["mean"], test["std"], test["z"]) == (
        want["mapsswe"]["segments"],
        precise["mean"],
        precise["std_dev"],
        precise["z"],
    )
    assert (test["significant"], test["better"]) == (want["mapsswe"]["significant"], want["mapsswe"]["better_system"])
    assert got["lossless"]  # in none of the five is a better than b
    (_, b_only), (a_only, _) = want["mcnemar_utterance"]["table_rows_a_cols_b"]
    assert (got["mcnemar"]["a_only_wrong"], got["mcnemar"]["b_only_wrong"]) == (a_only, b_only)
    difference = (want["systems"]["b"]["err"] - want["systems"]["a"]["err"]) / want["systems"]["a"]["words"]
    assert got["bootstrap"]["difference"] == pytest.approx(difference, rel=1e-12)
    assert got["bootstrap"]["low"] < difference < got["bootstrap"]["high"]
    assert (got["bootstrap"]["resamples"], got["bootstrap"]["seed"]) == (200, 1)


@pytest.mark.parametrize("case", CASES)
def test_compare_mirrors_when_the_systems_are_exchanged(case):
    ref, a, b = trns(case)
    got, mirrored = compare(ref, a, b, resamples=200), compare(ref, b, a, ("b", "a"), resamples=200)
    assert (mirrored.a, mirrored.b) == (got.b, got.a)
    assert (mirrored.mapsswe.mean, mirrored.mapsswe.z) == (-got.mapsswe.mean, -got.mapsswe.z)
    assert mirrored.mapsswe.better == {"a": "b", "b": "a", None: None}[got.mapsswe.better]
    assert mirrored.lossless == (not got.mapsswe.significant)
    assert mirrored.mcnemar["p"] == got.mcnemar["p"]
    assert mirrored.mcnemar["a_only_wrong"] == got.mcnemar["b_only_wrong"]
    assert mirrored.bootstrap["low"] == pytest.approx(-got.bootstrap["high"], rel=1e-12)


def test_compare_pairs_by_id_and_not_by_order():
    ref, a, b = trns("mixed_60")
    shuffled = list(b.utterances.items())
    random.Random(0).shuffle(shuffled)
    assert compare(ref, a, Trn(b.path, dict(shuffled)), resamples=50) == compare(ref, a, b, resamples=50)


def test_compare_lists_what_changed():
    ref = trn("r", u1="a b c", u2="d e", u3="f")
    got = compare(ref, trn("a", u1="a b c", u2="d x", u3=""), trn("b", u1="a c", u2="d x", u3="g"), resamples=10)
    assert got.changed == (
        {"utt_id": "u1", "ref": "a b c", "a": "a b c", "b": "a c", "errors_a": 0, "errors_b": 1},
        {"utt_id": "u3", "ref": "f", "a": "", "b": "g", "errors_a": 1, "errors_b": 1},
    )
    assert got.mcnemar["a_only_wrong"] == 0 and got.mcnemar["b_only_wrong"] == 1
    assert (got.utterances, got.words, got.mapsswe.segments) == (3, 6, 3)


def test_compare_with_alpha():
    ref, a, b = trns("tiny_rules")  # z = 2.307
    assert compare(ref, b, a, alpha=0.05, resamples=10).lossless is False
    strict = compare(ref, b, a, alpha=0.01, resamples=10)
    assert strict.lossless is True and strict.alpha == 0.01 and strict.bootstrap["level"] == 0.99


@pytest.mark.parametrize("case", CASES)
def test_the_bound_and_what_is_detectable_from_sctks_segments(case):
    """With n, mean and sd as sc_stats has them: sum d^2 = n mean^2 + (n - 1) sd^2; the growth of it adds little."""
    want = json.loads((GOLDEN / case / "expected.json").read_text(encoding="utf-8"))["mapsswe"]
    got = compare(*trns(case), resamples=10, margin=0.5)
    n, mean, std = want["segments"], want["full_precision"]["mean"], want["full_precision"]["std_dev"]
    least = (-n * mean + 1.6448536 * (n * mean**2 + (n - 1) * std**2) ** 0.5) / got.words
    assert least <= got.non_inferiority.upper * (1 + 1e-9) and got.non_inferiority.upper < least + 20 / got.words
    assert got.non_inferiority.margin == 0.5 and got.non_inferiority.non_inferior == (got.non_inferiority.upper < 0.5)
    assert got.detectable > 0


def test_several_test_sets_have_one_verdict():
    ref, a, b = trns("tiny_rules")  # b is better, z = 2.307, p 0.021
    worse = compare(ref, b, a, resamples=10, margin=1.0)
    same = compare(ref, a, a, resamples=10, margin=1.0)
    assert worse.mapsswe.better == "a" and same.mapsswe.z == 0.0
    one = combine([worse])
    assert one.p == (worse.mapsswe.p,) and not one.lossless and one.non_inferior
    two = combine([worse, same])
    assert two.p == pytest.approx((2 * worse.mapsswe.p, 1.0)) and not two.lossless  # 0.042
    assert not two.non_inferior  # nothing can be said of a set on which nothing differs
    three = combine([same, worse, same])
    assert three.p == pytest.approx((1.0, 3 * worse.mapsswe.p, 1.0)) and three.lossless  # 0.063
    better = combine([compare(ref, a, b, resamples=10, margin=1.0)] * 2)
    assert better.lossless and better.non_inferior
    empty = compare(trn("r", u="a"), trn("a", u="a"), trn("b", u="a"), resamples=10)
    assert combine([empty, worse]).p == (1.0, pytest.approx(2 * worse.mapsswe.p))


def test_groups_of_utterances_are_part_of_a_comparison():
    ref, a, b = trns("mixed_60")
    ids = list(ref.utterances)
    found = compare(ref, a, b, resamples=10, labels=Labels("half", {utt_id: "first" for utt_id in ids[:30]})).by
    assert found.key == "half" and {one.name for one in found.groups} == {"first", None}
    for one, part in zip(sorted(found.groups, key=lambda one: one.name is None), (ids[:30], ids[30:]), strict=True):
        alone = compare(*(Trn(x.path, {u: x.utterances[u] for u in part}) for x in (ref, a, b)), resamples=10)
        assert (one.wer_a, one.wer_b, one.words, one.utterances) == (alone.a.wer, alone.b.wer, alone.words, 30)
        assert (one.segments, one.upper) == (alone.mapsswe.segments, alone.non_inferiority.upper)
        assert one.detectable == alone.detectable
    assert compare(ref, a, b, resamples=10).by is None


def test_compare_of_two_perfect_systems(tmp_path):
    ref = trn("r", u1="a b", u2="")
    got = compare(ref, ref, ref, resamples=10)
    assert got.mapsswe.segments == 0 and got.mapsswe.z is None and "no errors" in got.mapsswe.note
    assert got.lossless and got.mcnemar["p"] == 1.0 and got.changed == () and got.a.wer == 0.0
    assert got.non_inferiority.upper is None and not got.non_inferiority.non_inferior and got.detectable is None
    got.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["mapsswe"]["p"] is None


def test_compare_of_a_system_with_itself():
    ref, a, _ = trns("mixed_60")
    got = compare(ref, a, a, resamples=10)
    assert got.mapsswe.z == 0.0 and "undefined" in got.mapsswe.note and got.lossless and got.changed == ()
    assert got.bootstrap["low"] == got.bootstrap["high"] == 0.0


def test_compare_without_reference_words():
    got = compare(trn("r", u1=""), trn("a", u1="x"), trn("b", u1=""), resamples=10)
    assert (got.a.wer, got.a.insertions, got.words, got.mapsswe.segments) == (0.0, 1, 0, 1)


def test_compare_refuses_different_utterances_and_names_them():
    ref = trn("ref.trn", u1="a", u2="a", u3="a", u4="a", u5="a")
    with pytest.raises(MpqError) as caught:
        compare(ref, trn("a.trn", u5="a"), trn("b.trn", u1="a", u2="a", u3="a", u4="a", u5="a", x="a"))
    assert str(caught.value) == (
        "a.trn: 4 utterances of ref.trn are missing: (u1), (u2), (u3), ...; "
        "b.trn: 1 utterances are not in ref.trn: (x); all files must hold the same utterances"
    )
    with pytest.raises(MpqError, match=r"^ref\.trn: expected at least one utterance, got none"):
        compare(trn("ref.trn"), trn("a.trn"), trn("b.trn"))


def test_compare_refuses_options_out_of_range():
    ref = trn("r", u1="a")
    with pytest.raises(MpqError, match="alpha"):
        compare(ref, ref, ref, alpha=5)
    with pytest.raises(MpqError, match="resamples"):
        compare(ref, ref, ref, resamples=0)
    with pytest.raises(MpqError, match="margin"):
        compare(ref, ref, ref, margin=-0.002)


# ---- folders of mpq evaluate


def test_read_evaluations(tmp_path):
    write_evaluation(tmp_path / "a", ["The cat", "a dog"], ["the cat", "a god"])
    write_evaluation(tmp_path / "b", ["the CAT", "a dog"], ["the mat", ""])
    ref, a, b = read_evaluations(tmp_path / "a", tmp_path / "b")
    assert ref.utterances == {"u0": ("the", "cat"), "u1": ("a", "dog")}
    assert a.utterances == {"u0": ("the", "cat"), "u1": ("a", "god")} and a.path == tmp_path / "a" / "hyp.trn"
    assert b.utterances == {"u0": ("the", "mat"), "u1": ()} and b.path == tmp_path / "b" / "hyp.trn"
    got = compare(ref, a, b, resamples=10)
    for system, folder in [(got.a, "a"), (got.b, "b")]:  # evaluate and compare print the same numbers
        written = json.loads((tmp_path / folder / "metrics.json").read_text())
        assert {key: written[key] for key in system.to_json() if key != "name"} == {
            key: value for key, value in system.to_json().items() if key != "name"
        }


def test_read_evaluations_refuses_an_unfinished_one(tmp_path):
    write_evaluation(tmp_path / "a", ["x"], ["x"])
    write_evaluation(tmp_path / "b", ["x"], ["x"])
    (tmp_path / "b" / "metrics.json").unlink()
    with pytest.raises(MpqError, match=r"b: metrics\.json is missing: .*run mpq evaluate again"):
        read_evaluations(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "metrics.json").write_text('{"format": "mpq.comparison/1"}')
    with pytest.raises(MpqError, match=r'metrics\.json: "format": expected "mpq\.metrics/1"'):
        read_evaluations(tmp_path / "a", tmp_path / "b")
    with pytest.raises(MpqError, match=r"c: no such folder; expected one that mpq evaluate wrote"):
        read_evaluations(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    "references, message",
    [
        (["x", "y z"], r"utterance \(u1\): expected the same reference as in .*, 'y', got 'y z'"),
        (["x"], r"utterance \(u1\): expected the same reference as in .*, 'y', got no such utterance"),
        (["x", "y", ""], r"utterance \(u2\): expected the same reference as in .*, no such utterance, got ''"),
    ],
)
def test_read_evaluations_refuses_different_references(tmp_path, references, message):
    write_evaluation(tmp_path / "a", ["x", "y"], ["x", "y"])
    write_evaluation(tmp_path / "b", references, references)
    with pytest.raises(MpqError, match=message):
        read_evaluations(tmp_path / "a", tmp_path / "b")
