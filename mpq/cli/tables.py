"""Records -> tables for a person. Nothing is computed here but sums and percentages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mpq.allocation.records import Allocation
from mpq.sensitivity.records import SensitivityTable

if TYPE_CHECKING:  # these import torch, which a comparison does not need
    from mpq.allocation.pack import PackResult
    from mpq.cli.inspection import Inspection
    from mpq.finetuning.record import FinetuneResult
    from mpq.pipeline.record import RunResult
    from mpq.scoring.evaluate import Evaluation
    from mpq.search.record import SearchResult
    from mpq.training.record import TrainingResult

MB = 2**20


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the error, and would end the process


def console() -> Console:
    """Returns a console on stdout that does not cut names short where stdout is no terminal."""
    plain = _Console(highlight=False, markup=False, emoji=False)
    return plain if plain.is_terminal else _Console(width=160, highlight=False, markup=False, emoji=False)


def evaluation_view(evaluation: "Evaluation") -> Group:
    """Returns word errors in all and by utterance length, and the speed."""
    m = evaluation.metrics
    table = table_of("utterances", "number", "words", "errors", "WER %", "S", "D", "I")
    counts = (m.substitutions, m.deletions, m.insertions)
    table.add_row("all", *map(str, (m.utterances, m.words, sum(counts))), f"{100 * m.wer:.3f}", *map(str, counts))
    for bucket in m.by_length:
        end = "any length" if bucket.max_seconds is None else f"{bucket.max_seconds:g} s"
        numbers = map(str, (bucket.utterances, bucket.words, bucket.errors))
        table.add_row(f"{bucket.min_seconds:g} s to {end}", *numbers, f"{100 * bucket.wer:.3f}", "", "", "")
    return view_of(
        f"{evaluation.model['path']} on {evaluation.data['path']}: WER {m.wer:.2%}",
        table,
        f"{m.sentence_errors} utterances with an error, {m.empty_outputs} empty outputs, {m.loop_outputs} repeated "
        f"loops, {evaluation.skipped} skipped"
        + (f", {evaluation.escaped} with characters that SCTK reads as markup" if evaluation.escaped else ""),
        f"{m.audio_seconds:.0f} s of audio in {evaluation.compute_seconds:.1f} s on {evaluation.device}: real-time "
        f"factor {evaluation.real_time_factor:.4f}",
    )


def training_view(training: "TrainingResult", most: int = 10) -> Group:
    """Returns the last and the best epochs, and what the model is."""
    table = table_of("epoch", "updates", "train loss", "dev loss", "dev WER %", "seconds")
    shown = {one.epoch for one in training.epochs[-most:]} | set(training.averaged)
    for one in training.epochs:
        if one.epoch in shown:
            dev = ("", "") if one.dev_wer is None else (f"{one.dev_loss:.4f}", f"{100 * one.dev_wer:.2f}")
            name = f"{one.epoch}{' *' if one.epoch in training.averaged else ''}"
            table.add_row(name, str(one.step), f"{one.train_loss:.4f}", *dev, f"{one.seconds:.0f}")
    left_out = f"; left out: {training.skipped} faulty, {training.too_long} too long"
    wer = "" if training.dev_wer is None else f"dev WER {training.dev_wer:.2%}; "
    return view_of(
        f"{wer}{len(training.epochs)} epochs, {training.seconds / 60:.1f} minutes on {training.device}",
        table,
        "losses in nats a token; the model is the mean of the epochs with a *"
        + ("" if training.dev_loss is None else f", its dev loss {training.dev_loss:.4f}"),
        f"{training.parameters['total'] / 1e6:.2f} M parameters; {training.utterances} utterances, "
        f"{training.hours:.2f} hours{left_out if training.skipped or training.too_long else ''}",
    )


def sensitivity_view(sensitivity: SensitivityTable, most: int = 10) -> Group:
    """Returns the layers that suffer most at the smallest width."""
    table = table_of("layer", "weights", *(f"{bits} bits" for bits in sensitivity.bits))
    for layer in sorted(sensitivity.layers, key=lambda layer: -layer.kl[sensitivity.bits[0]])[:most]:
        table.add_row(layer.name, str(layer.numel), *(f"{layer.kl[bits]:.2e}" for bits in sensitivity.bits))
    table.add_section()
    sums = (sum(layer.kl[bits] for layer in sensitivity.layers) for bits in sensitivity.bits)
    weights = sum(layer.numel for layer in sensitivity.layers)
    table.add_row("sum of all layers", str(weights), *(f"{total:.2e}" for total in sums))
    data = sensitivity.data
    method = {"kl": "measured one layer at a time", "fisher": "to second order"}.get(sensitivity.method, "")
    row = "token" if sensitivity.output == "decoder" else "frame"
    return view_of(
        f"KL divergence of the {sensitivity.output} output, nats per {row}, {method or sensitivity.method}: the "
        f"{min(most, len(sensitivity.layers))} most sensitive of {len(sensitivity.layers)} layers",
        table,
        f"measured on {data.get('utterances')} utterances, {data.get('frames')} frames of {data.get('path')}"
        + ("; nothing is left of it to measure a whole model on (--seconds)" if data.get("left_seconds") == 0 else ""),
        *_unreached_note(sensitivity.unreached),
    )


def _unreached_note(names: Sequence[str]) -> list[str]:
    """Returns a line about the layers that no calibration data reach, if there are any."""
    return [f"rounded to nearest, because no calibration data reach them: {', '.join(names)}"] if names else []


def allocation_view(allocation: Allocation) -> Group:
    """Returns how many layers have which width, and the size."""
    table = table_of("bits", "layers")
    for bits in sorted(set(allocation.bits.values())):
        table.add_row(str(bits), str(sum(width == bits for width in allocation.bits.values())))
    measured = "not measured (--measure CKPT does)"
    if allocation.measured_kl is not None:
        seconds = allocation.measured_seconds
        measured = (
            f"measured {allocation.measured_kl:.4g} (all layers together, a frame at most 1) on {seconds:.0f} s that "
            "the sensitivities have not seen"
        )
    notes = [
        f"{allocation.average_bits:.3f} bits a weight on average, codes alone",
        f"divergence, nats per frame: predicted {allocation.predicted_kl:.4g} (sum over the layers), {measured}",
    ]
    if done := allocation.refinement:
        notes.append(
            f"refined by {done['moves']} moves: {done['before']:.4g} -> {done['after']:.4g} on the "
            f"{done['seconds']:.0f} s that decided on them, {done['measured_before']:.4g} -> "
            f"{allocation.measured_kl:.4g} on those that did not"
        )
    notes.append(f"frontier: {len(allocation.frontier)} points; {allocation.frontier_note}")
    tables = [table]
    if allocation.measured:
        points = table_of("MB", "predicted KL", "measured KL")
        for size, *divergences in allocation.measured:
            points.add_row(f"{size / MB:.3f}", *(f"{divergence:.4g}" for divergence in divergences))
        tables.append(points)
    return view_of(
        f"{allocation.predicted_bytes} bytes ({allocation.predicted_bytes / MB:.3f} MB) of at most "
        f"{allocation.target_bytes} ({allocation.target_bytes / MB:.3f} MB)",
        Group(*tables),
        *notes,
    )


def pack_line(result: "PackResult") -> str:
    """Returns a line with the size and how it compares, and one with what it does to the output."""
    line = (
        f"{result.path}: {result.size_bytes} bytes ({result.size_bytes / MB:.3f} MB), {result.ratio:.2f} times smaller "
        f"than float32, {result.average_bits:.3f} bits a weight (nominally {result.nominal_bytes / MB:.3f} MB)"
    )
    if result.predicted_bytes is not None:
        line += f"; predicted {result.predicted_bytes}, at most {result.target_bytes}"
    line += "".join(f"\n{note}" for note in _unreached_note(result.unreached))
    one_step = result.scheme == "entropy" and result.rounding == "nearest"
    steps = ", one step a layer (steps for each column need calibration data)" if one_step else ""
    line += f"\nrounding {result.rounding}{steps}; divergence, nats per frame: "
    if result.predicted_kl is not None:
        line += f"predicted {result.predicted_kl:.4g} (sum over the layers), "
    if result.measured_kl is None:
        return line + f"not measured: {result.measured_on}"
    return line + f"measured {result.measured_kl:.4g} (all layers together, a frame at most 1) on {result.measured_on}"


def finetune_view(result: "FinetuneResult") -> Group:
    """Returns each size with its held-out errors before and after, and what was trained."""
    table = table_of("file", "bytes", "times smaller", "bits a weight", "divergence before", "after", "WER %", "after")
    for size in result.sizes:
        wers = ("" if wer is None else f"{100 * wer:.2f}" for wer in (size.start_wer, size.wer))
        divergences = (f"{one:.4g}" for one in (size.start_divergence, size.divergence))
        numbers = (str(size.size_bytes), f"{size.ratio:.2f}", f"{size.average_bits:.3f}")
        table.add_row(size.path, *numbers, *divergences, *wers)
    epochs = ", ".join(map(str, result.averaged))
    count = result.epochs[-1].epoch
    if result.averaged == (0,):
        kept = f"kept the starting weights: none of the {count} epochs improved on them"
    else:
        kept = f"kept epochs {epochs} of {count}"
    return view_of(
        "fine-tuned" if len(result.sizes) == 1 else f"fine-tuned, {len(result.sizes)} sizes from one training",
        table,
        f"{kept}; divergence in nats per frame, a frame at most 1; development data",
        f"{result.utterances} utterances, {result.hours:.2f} h, {result.transcribed} with a transcript; "
        f"{result.epochs[-1].step} updates in {result.seconds:.0f} s, seed {result.seed}",
    )


def search_view(result: "SearchResult") -> Group:
    """Returns the widths and ranks block by block, sizes, and losses and WERs on held-out data."""
    found, done = result.architecture, result.training
    has_ranks = any(one.rank for one in found.modules)
    table = table_of("block", "FW", "FW-m", *(("BN", "BN-m") if has_ranks else ()))
    for block, ((width, rank), (width2, rank2)) in enumerate(found.shapes(), 1):
        table.add_row(str(block), str(width), str(width2), *((str(rank), str(rank2)) if has_ranks else ()))

    def scored(loss: float, wer: float | None) -> str:
        return f"loss {loss:.4g}" + ("" if wer is None else f", WER {100 * wer:.2f} %")

    trained = "" if done.dev_loss is None else f"; trained on {scored(done.dev_loss, done.dev_wer)} (development data)"

    penalty = f"eta {result.eta:g}" if result.eta is not None else f"at most {result.target_millions:g} M parameters"
    return view_of(
        f"{found.millions:.3f} M parameters of {found.largest_millions:.3f} M ({result.method}, {penalty})",
        table,
        f"expected parameters {found.expected_millions:.3f} M; held-out data: the largest "
        f"{scored(found.largest_loss, found.largest_wer)}; this one {scored(found.loss, found.wer)}{trained}",
        f"supernet {result.supernet_seconds:.0f} s ({result.supernet}), choice {found.seconds:.0f} s, training "
        f"{done.seconds:.0f} s, {len(done.epochs)} epochs",
    )


def inspection_view(inspection: "Inspection") -> Group:
    """Returns every layer and the totals."""
    table = table_of("layer", "kind", "shape", "weights", "bits", "bytes")
    for layer in inspection.layers:
        shape = " x ".join(map(str, layer.shape))
        bits = "float" if layer.bits is None else str(layer.bits)
        table.add_row(layer.name, layer.kind, shape, str(layer.numel), bits, str(layer.bytes))
    weights, size = sum(layer.numel for layer in inspection.layers), sum(layer.bytes for layer in inspection.layers)
    table.add_section()
    table.add_row(f"{len(inspection.layers)} layers", "", "", str(weights), "", str(size))
    return view_of(
        f"{inspection.family} {inspection.architecture}: {inspection.parameters['total'] / 1e6:.3f} M parameters "
        f"(encoder blocks {inspection.parameters['encoder_blocks'] / 1e6:.3f} M), "
        + ("no file yet" if inspection.file_bytes is None else f"file {inspection.file_bytes / MB:.3f} MB"),
        table,
    )


def run_view(run: "RunResult") -> Group:
    """Returns what became of each stage, then the sizes and word errors before and after.

    "times smaller" compares with the parameters in float32; after a search, with the file of the model before it.
    """
    stages = table_of("stage", "", "why", "seconds")
    for one in run.stages:
        stages.add_row(one.name, one.action, one.reason, "" if one.seconds is None else f"{one.seconds:.0f}")
    results = {one.name: one.result for one in run.stages}
    views: list[Table | str] = [stages]
    if tests := results.get("evaluate", {}).get("tests", {}):
        table = table_of("model", "bytes", "times smaller", *(f"{name} WER %" for name in tests))
        found, packed, tuned = (results.get(name, {}) for name in ("search", "pack", "finetune"))
        compared = results.get("compare", {})
        size = found.get("baseline_bytes") or packed.get("float_bytes")
        wers = (f"{100 * one['wer']:.2f}" for one in tests.values())
        table.add_row("float32", str(size or ""), "1" if size else "", *wers)
        files = ("searched", found, "searched"), ("packed", packed, "tests"), ("fine-tuned", tuned, "finetuned")
        for name, file, scores in files:
            if file and (scored := compared.get(scores)):
                cells = (
                    f"{100 * one['wer']:.2f} {'(lossless)' if one['lossless'] else '(significantly worse)'}"
                    for one in scored.values()
                )
                table.add_row(name, str(file["size_bytes"]), f"{size / file['size_bytes']:.2f}", *cells)
        views.append(table)
        if compared.get("tests"):
            views.append("lossless: not significantly worse than float32 (MAPSSWE)")
    return view_of(f"{run.out}{': what a run would do' if run.is_dry else ''}", Group(*views))


def table_of(*columns: str) -> Table:
    """Returns a table whose first column is text and whose others are numbers."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=not index)
    return table


def view_of(title: str, table: Table | Group, *notes: str) -> Group:
    """Returns a table with a title above it and a line for each note below."""
    return Group(Text(title, style="bold"), table, *map(Text, notes))
