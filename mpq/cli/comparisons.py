"""Comparisons as tables and sentences for a person."""

from rich.console import Group
from rich.table import Table

from mpq.cli.tables import table_of, view_of
from mpq.scoring.records import Comparison, Comparisons, Groups, SystemScore


def comparison_view(comparison: Comparison) -> Group:
    """Returns both systems' errors and their difference, with the verdict of the tests and what they could show."""
    table = table_of("system", "WER %", "correct", "S", "D", "I", "utterances with errors")
    for system in (comparison.a, comparison.b):
        table.add_row(system.name, f"{100 * system.wer:.3f}", *map(str, _counts(system)))
    deltas = (b - a for a, b in zip(_counts(comparison.a), _counts(comparison.b), strict=True))
    table.add_row("difference", f"{100 * (comparison.b.wer - comparison.a.wer):+.3f}", *(f"{d:+d}" for d in deltas))
    test, interval, mcnemar = comparison.mapsswe, comparison.bootstrap, comparison.mcnemar
    statistic = "no statistic" if test.z is None else f"Z {test.z:.3f}, p {test.p:.3g} (sc_stats: {test.p_sctk:.3f})"
    view = view_of(
        f"{comparison.b.name} against {comparison.a.name}: {_verdict(comparison.lossless)} (MAPSSWE, alpha "
        f"{comparison.alpha:g})",
        table,
        *_what_is_shown(comparison),
        f"MAPSSWE: {test.segments} segments, mean {test.mean:+.3f}, sd {test.std:.3f}, {statistic}",
        *([f"         {test.note}"] if test.note else []),
        f"McNemar (exact): {mcnemar['a_only_wrong']} utterances wrong only in the first, "
        f"{mcnemar['b_only_wrong']} only in the second, p {mcnemar['p']:.3g}",
        f"Bootstrap: WER {100 * interval['difference']:+.3f} points, {interval['level']:.0%} interval "
        f"[{100 * interval['low']:+.3f}, {100 * interval['high']:+.3f}]",
        f"{comparison.utterances} utterances, {comparison.words} words; {len(comparison.changed)} outputs differ",
    )
    return Group(view, groups_view(comparison.by, comparison.alpha)) if comparison.by else view


def _verdict(is_lossless: bool) -> str:
    return "lossless: not significantly worse" if is_lossless else "NOT lossless: significantly worse"


def _what_is_shown(comparison: Comparison) -> list[str]:
    """Returns how much worse the second system may be, and how small a loss the test set could have shown."""
    found, detectable = comparison.non_inferiority, comparison.detectable
    margin = f"the margin of {100 * found.margin:g} points"
    if found.upper is None or detectable is None:
        why = comparison.mapsswe.note if comparison.words else "the reference has no words"
        return [f"How much worse it may be, and whether within {margin}, cannot be said: {why}."]
    much = f"at most {100 * found.upper:.2f} points worse"
    if found.upper < 0:
        much = f"at least {-100 * found.upper:.2f} points better"
    shown = f"within {margin} (non-inferior)" if found.non_inferior else f"NOT shown to be within {margin}"
    return [
        f"With 95 % confidence it is {much}: {shown}.",
        f"This test set would show a loss of {100 * detectable:.2f} points or more four times in five.",
    ]


def comparisons_view(comparisons: Comparisons) -> Group:
    """Returns the verdict on each test set and that on all of them."""
    table = table_of(
        "test set", "WER % first", "second", "at most worse by", "would show", "p", "p of all (Holm)", "verdict"
    )
    for one, p in zip(comparisons.sets, comparisons.p, strict=True):
        raw = "" if one.mapsswe.p is None else f"{one.mapsswe.p:.3g}"
        verdict = "worse" if one.mapsswe.better == "a" and p < one.alpha else "no loss found"
        bounds = _points(one.non_inferiority.upper), _points(one.detectable)
        table.add_row(one.b.name, f"{100 * one.a.wer:.3f}", f"{100 * one.b.wer:.3f}", *bounds, raw, f"{p:.3g}", verdict)
    margin = f"the margin of {100 * comparisons.sets[0].non_inferiority.margin:g} points"
    return view_of(
        f"All {len(comparisons.sets)} test sets: {_verdict(comparisons.lossless)} on "
        f"{'any' if comparisons.lossless else 'at least one'} (MAPSSWE, Holm, alpha {comparisons.sets[0].alpha:g})",
        table,
        f"Shown to be within {margin} on every test set (non-inferior)."
        if comparisons.non_inferior
        else f"NOT shown to be within {margin} on every test set.",
        '"at most worse by" (95 %, one-sided) and "would show" (four times in five) are in points of word error rate.',
    )


def groups_view(groups: Groups, alpha: float) -> Group:
    """Returns both systems' errors group by group, those first that lose most, and the worst group."""
    headings = ("utterances", "words", "WER % first", "second", "difference", "at most worse by", "p (Holm)", "verdict")
    table = table_of(groups.key, *headings)
    for one in groups.groups:
        rates = (f"{100 * one.wer_a:.2f}", f"{100 * one.wer_b:.2f}", f"{100 * (one.wer_b - one.wer_a):+.2f}")
        verdict = "too small to tell" if one.too_small else "worse" if one.worse else "no loss found"
        p = "" if one.p is None else f"{one.p:.3g}"
        name = f"(no {groups.key})" if one.name is None else one.name
        table.add_row(name, str(one.utterances), str(one.words), *rates, _points(one.upper), p, verdict)
    small = sum(one.too_small for one in groups.groups)
    tested = len(groups.groups) - small
    worst = next((one for one in groups.groups if one.name == groups.worst and not one.too_small), None)
    lines = [] if worst is None else [f"Worst: {worst.name}, {100 * (worst.wer_b - worst.wer_a):+.2f} points."]
    if small:
        lines.append(f"{small} of {len(groups.groups)} groups have too few errors to tell (below 30 segments).")
    return view_of(
        f"By {groups.key}: {sum(one.worse for one in groups.groups)} of {tested} groups that can be tested are "
        f"significantly worse (MAPSSWE, Holm, alpha {alpha:g})",
        table,
        *lines,
    )


def _points(rate: float | None) -> str:
    """Returns a word error rate in points, nothing for none."""
    return "" if rate is None else f"{100 * rate:.2f}"


def changes_view(comparison: Comparison, most: int) -> Group:
    """Returns the changed outputs, those with the largest change in errors first."""
    table = Table()
    for column in ("utterance", "errors", "reference / first / second"):
        table.add_column(column, overflow="fold")
    ranked = sorted(comparison.changed, key=lambda change: -abs(change["errors_b"] - change["errors_a"]))
    for change in ranked[:most]:
        texts = "\n".join((change["ref"], change["a"], change["b"]))
        table.add_row(change["utt_id"], f"{change['errors_a']} -> {change['errors_b']}", texts)
    return view_of(f"Changed outputs, {min(most, len(ranked))} of {len(ranked)}:", table)


def _counts(system: SystemScore) -> tuple[int, ...]:
    """Returns the numbers of a row of the comparison, from correct words to utterances with errors."""
    return system.correct, system.substitutions, system.deletions, system.insertions, system.sentence_errors
