"""Records -> tables for a person. Nothing is computed here but sums and percentages."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mpq.records import Allocation, Comparison, SensitivityTable, SystemScore

if TYPE_CHECKING:  # these import torch, which a comparison does not need
    from mpq.evaluate import Evaluation
    from mpq.inspection import Inspection
    from mpq.pack import PackResult

MB = 2**20


def console() -> Console:
    """Returns a console on stdout that does not cut names short where stdout is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def _table(title: str, *columns: str) -> Table:
    """Returns a table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=not index)
    return table


def evaluation_table(evaluation: "Evaluation") -> Table:
    """Returns word errors in all and by utterance length, and the speed."""
    m = evaluation.metrics
    table = _table(
        f"{evaluation.model['path']} on {evaluation.data['path']}: WER {m.wer:.2%}",
        "utterances", "number", "words", "errors", "WER %", "S", "D", "I",
    )  # fmt: skip
    errors = m.substitutions + m.deletions + m.insertions
    counts = (m.substitutions, m.deletions, m.insertions)
    table.add_row("all", *map(str, (m.utterances, m.words, errors)), f"{100 * m.wer:.3f}", *map(str, counts))
    for bucket in m.by_length:
        label = f"{bucket.min_seconds:g} s to {f'{bucket.max_seconds:g} s' if bucket.max_seconds else 'any length'}"
        table.add_row(
            label, *map(str, (bucket.utterances, bucket.words, bucket.errors)), f"{100 * bucket.wer:.3f}", "", "", ""
        )
    table.caption = (
        f"{m.sentence_errors} utterances with an error, {m.empty_outputs} empty outputs, {m.loop_outputs} repeated "
        f"loops, {evaluation.skipped} skipped; {m.audio_seconds:.0f} s of audio in {evaluation.compute_seconds:.1f} s "
        f"on {evaluation.device} (real-time factor {evaluation.real_time_factor:.4f})"
    )
    table.caption_justify = "left"
    return table


def sensitivity_table(table: SensitivityTable, most: int = 15) -> Table:
    """Returns the layers that suffer most at the smallest width."""
    view = _table(
        f"KL divergence of the {table.output} output, nats per frame ({table.data.get('utterances')} utterances, "
        f"{table.data.get('frames')} frames): the {min(most, len(table.layers))} most sensitive of {len(table.layers)}",
        "layer", "weights", *(f"{bits} bits" for bits in table.bits),
    )  # fmt: skip
    for layer in sorted(table.layers, key=lambda layer: -layer.kl[table.bits[0]])[:most]:
        view.add_row(layer.name, str(layer.numel), *(f"{layer.kl[bits]:.2e}" for bits in table.bits))
    view.add_row(
        "sum of all layers",
        str(sum(layer.numel for layer in table.layers)),
        *(f"{sum(layer.kl[bits] for layer in table.layers):.2e}" for bits in table.bits),
    )
    return view


def allocation_table(allocation: Allocation) -> Table:
    """Returns how many layers have which width, and the size."""
    table = _table(
        f"{allocation.predicted_bytes} bytes ({allocation.predicted_bytes / MB:.3f} MB) of at most "
        f"{allocation.target_bytes} ({allocation.target_bytes / MB:.3f} MB)",
        "bits", "layers",
    )  # fmt: skip
    for bits in sorted(set(allocation.bits.values())):
        table.add_row(str(bits), str(sum(width == bits for width in allocation.bits.values())))
    table.caption = (
        f"{allocation.average_bits:.3f} bits a weight on average, codes alone; predicted KL "
        f"{allocation.predicted_kl:.4g} nats per frame; frontier of {len(allocation.frontier)} points. "
        f"{allocation.frontier_note}"
    )
    table.caption_justify = "left"
    return table


def pack_line(result: "PackResult") -> str:
    """Returns one line with the size and how it compares."""
    line = (
        f"{result.path}: {result.size_bytes} bytes ({result.size_bytes / MB:.3f} MB), {result.ratio:.2f} times smaller "
        f"than float32, {result.average_bits:.3f} bits a weight"
    )
    if result.predicted_bytes is not None:
        line += f"; predicted {result.predicted_bytes}, at most {result.target_bytes}"
    return line


def inspection_table(inspection: "Inspection") -> Table:
    """Returns every layer and the totals."""
    file_mb = inspection.file_bytes / MB
    table = _table(
        f"{inspection.family} {inspection.architecture}: {inspection.parameters['total'] / 1e6:.3f} M parameters "
        f"(encoder blocks {inspection.parameters['encoder_blocks'] / 1e6:.3f} M), file {file_mb:.3f} MB",
        "layer", "kind", "shape", "weights", "bits", "bytes",
    )  # fmt: skip
    for layer in inspection.layers:
        shape = " x ".join(map(str, layer.shape))
        bits = "float" if layer.bits is None else str(layer.bits)
        table.add_row(layer.name, layer.kind, shape, str(layer.numel), bits, str(layer.bytes))
    weights, size = sum(layer.numel for layer in inspection.layers), sum(layer.bytes for layer in inspection.layers)
    table.add_section()
    table.add_row(f"{len(inspection.layers)} layers", "", "", str(weights), "", str(size))
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Returns both systems' errors and their difference, with the verdict of the tests."""
    verdict = "lossless: not significantly worse" if comparison.lossless else "significantly worse: NOT lossless"
    table = _table(
        f"{comparison.b.name} against {comparison.a.name}: {verdict} (MAPSSWE, alpha {comparison.alpha:g})",
        "system", "WER %", "correct", "S", "D", "I", "utterances with errors",
    )  # fmt: skip
    for system in (comparison.a, comparison.b):
        table.add_row(system.name, f"{100 * system.wer:.3f}", *(str(count) for count in _counts(system)))
    deltas = [b - a for a, b in zip(_counts(comparison.a), _counts(comparison.b), strict=True)]
    table.add_row("difference", f"{100 * (comparison.b.wer - comparison.a.wer):+.3f}", *(f"{d:+d}" for d in deltas))
    test, interval, mcnemar = comparison.mapsswe, comparison.bootstrap, comparison.mcnemar
    statistic = (
        "no statistic" if test.z is None else f"Z {test.z:.3f}, p {test.p:.4f} (sc_stats prints {test.p_sctk:.3f})"
    )
    table.caption = (
        f"MAPSSWE: {test.segments} segments, mean {test.mean:+.3f}, sd {test.std:.3f}, {statistic}"
        f"{f'; {test.note}' if test.note else ''}\n"
        f"McNemar (exact): {mcnemar['a_only_wrong']} utterances wrong only in the first, "
        f"{mcnemar['b_only_wrong']} only in the second, p {mcnemar['p']:.4f}\n"
        f"Bootstrap: the WER changes by {100 * interval['difference']:+.3f} points, {interval['level']:.0%} interval "
        f"[{100 * interval['low']:+.3f}, {100 * interval['high']:+.3f}]\n"
        f"{comparison.utterances} utterances, {comparison.words} words; {len(comparison.changed)} outputs differ"
    )
    table.caption_justify = "left"
    return table


def changes_table(comparison: Comparison, most: int) -> Table:
    """Returns the changed utterances, those with the largest change in errors first."""
    table = Table(title=f"Changed outputs ({min(most, len(comparison.changed))} of {len(comparison.changed)})")
    for column in ("utterance", "errors", "reference / first / second"):
        table.add_column(column, overflow="fold")
    ranked = sorted(comparison.changed, key=lambda change: -abs(change["errors_b"] - change["errors_a"]))
    for change in ranked[:most]:
        texts = "\n".join((change["ref"], change["a"], change["b"]))
        table.add_row(change["utt_id"], f"{change['errors_a']} -> {change['errors_b']}", texts)
    return table


def _counts(system: SystemScore) -> tuple[int, ...]:
    return system.correct, system.substitutions, system.deletions, system.insertions, system.sentence_errors
