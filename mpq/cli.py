"""The command line: it parses, calls one function, prints. Everything else is imported inside the commands, so that
`mpq --help` starts without torch."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from mpq import __version__
from mpq.errors import MpqError
from mpq.options import (
    EXISTING,
    PatternBits,
    Widths,
    channel_options,
    common_options,
    data_options,
    given,
    quantizer_options,
    seconds_or_all,
)


class Cli(click.Group):
    """The border where errors become one line and an exit status: 2 bad input, 130 interrupted, 1 a fault of mpq."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except MpqError as error:
            click.echo(f"mpq: {error}", err=True)
            status = 2
        except click.ClickException as error:
            error.show()
            status = 2
        except (click.Abort, KeyboardInterrupt):
            click.echo("mpq: interrupted; the same command goes on where it stopped", err=True)
            status = 130
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mpq")
def main() -> None:
    """Make a trained speech recogniser as small as its device needs, and test that it is no worse.

    \b
    mpq evaluate    model.nemo --data dev.jsonl --out runs/fp32
    mpq sensitivity model.nemo --data train.jsonl --bits 2,3,4,5,6,8 --out sens.json
    mpq allocate    sens.json --target-mb 7.5 --out alloc.json
    mpq pack        model.nemo --allocation alloc.json --out small.safetensors
    mpq evaluate    small.safetensors --data dev.jsonl --out runs/small
    mpq compare     runs/fp32 runs/small
    """


def _print(result: Any, as_json: bool, *views: Any) -> None:
    if as_json:
        click.echo(json.dumps(result.to_json(), ensure_ascii=False))
        return
    from mpq.report import console

    for view in views:
        console().print(view, soft_wrap=isinstance(view, str))


@main.command()
@click.argument("checkpoint", type=EXISTING)
@data_options
@click.option("--out", required=True, type=EXISTING, help="Folder for hyp.trn, ref.trn and metrics.json.")
@click.option("--batch-seconds", default=60.0, show_default=True, help="Padded audio in one batch.")
@common_options
def evaluate(
    checkpoint: Path,
    data: Path,
    out: Path,
    channel: str,
    skip_bad: bool,
    batch_seconds: float,
    device: str,
    quiet: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Transcribe a test set (greedy CTC) and count the word errors.

    CHECKPOINT is a NeMo archive or a file that `mpq pack` wrote. All faults of the data are reported before any work
    starts. A run that was cut off goes on where it stopped.

    \b
    Example:
      mpq evaluate stt_en_conformer_ctc_small.nemo --data dev.jsonl --out runs/fp32
    """
    from mpq import evaluate as step
    from mpq.report import evaluation_view

    result = step.evaluate(
        checkpoint,
        data,
        out,
        max_batch_seconds=batch_seconds,
        channel=channel,
        skip_bad=skip_bad,
        device=device,
        quiet=quiet,
    )
    _print(result, as_json, evaluation_view(result))


@main.command()
@click.argument("checkpoint", type=EXISTING)
@data_options
@click.option("--bits", required=True, type=Widths(), help="Bit-widths to measure, 1 to 8.")
@click.option("--out", required=True, type=EXISTING, help="The mpq.sensitivity/1 file to write.")
@quantizer_options
@click.option("--output", default="ctc", show_default=True, type=click.Choice(["ctc", "encoder"]), help="Whose KL.")
@click.option(
    "--method",
    default="fisher",
    show_default=True,
    type=click.Choice(["fisher", "kl"]),
    help="fisher: second order, fast; kl: one layer at a time, exact (Li et al. 2023, Eq. 7).",
)
@click.option(
    "--seconds", help="Use a random part of the data of this length, or all. Default: 300 (fisher) or 60 (kl)."
)
@common_options
def sensitivity(
    checkpoint: Path,
    data: Path,
    bits: list[int],
    out: Path,
    channel: str,
    skip_bad: bool,
    device: str,
    quiet: bool,
    output: str,
    method: str,
    seconds: str | None,
    seed: int,
    as_json: bool,
    **quantizer: Any,
) -> None:
    """Measure how much the output suffers from each layer at each bit-width: KL divergence per frame, in nats.

    A run that was cut off goes on where it stopped; with more --bits only the new ones are measured. Transcripts are
    not used. Under torchrun the processes of one machine share the work.

    \b
    Example:
      mpq sensitivity model.nemo --data train.jsonl --bits 2,3,4,5,6,8 --out sens.json
    """
    from mpq.artifact import Storage
    from mpq.report import sensitivity_view
    from mpq.sensitivity import METHODS, measure_sensitivity

    table = measure_sensitivity(
        checkpoint,
        data,
        bits,
        out,
        Storage.from_json({"rounding": "gptq"} | given(quantizer)),
        method=method,
        output=output,
        max_seconds=seconds_or_all(seconds, METHODS[method]),
        seed=seed,
        channel=channel,
        skip_bad=skip_bad,
        device=device,
        quiet=quiet,
    )
    if int(os.environ.get("RANK", "0")) == 0 or "TORCHELASTIC_RUN_ID" not in os.environ:
        _print(table, as_json, sensitivity_view(table))  # one of torchrun's processes speaks


@main.command()
@click.argument("sensitivity", type=EXISTING)
@click.option("--target-mb", type=float, help="Upper bound of the packed file's size; 1 MB is 2^20 bytes.")
@click.option("--target-ratio", type=float, help="How many times smaller than with every layer at 32 bits.")
@click.option("--average-bits", type=float, help="Upper bound of the average code bits per weight.")
@click.option(
    "--max-divergence",
    type=float,
    help="The smallest file with at most this; with --measure: measured.",
)
@click.option("--keep", multiple=True, type=PatternBits(), help="At least BITS for the layers that match.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave the layers that match unquantized.")
@click.option("--tie", multiple=True, metavar="PATTERN", help="One width for layers that differ in no * of PATTERN.")
@click.option("--whole-frontier", is_flag=True, help="List every trade-off, also where that takes seconds.")
@click.option("--measure", type=EXISTING, metavar="CKPT", help="Measure the answer, all layers quantized together.")
@click.option("--refine", type=EXISTING, metavar="CKPT", help="Measure it, and look for moves that make it better.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="How long to look for moves. Default: 10.")
@click.option("--points", type=click.IntRange(0, 1000), help="Sizes of the frontier that are measured too. Default: 5.")
@click.option("--data", type=EXISTING, help="Where the calibration data are now, if not where SENSITIVITY says.")
@click.option("--out", required=True, type=EXISTING, help="The mpq.allocation/1 file to write.")
@common_options
def allocate(
    sensitivity: Path,
    target_mb: float | None,
    target_ratio: float | None,
    average_bits: float | None,
    max_divergence: float | None,
    keep: tuple[tuple[str, int], ...],
    exclude: tuple[str, ...],
    tie: tuple[str, ...],
    whole_frontier: bool,
    measure: Path | None,
    refine: Path | None,
    minutes: float | None,
    points: int | None,
    data: Path | None,
    out: Path,
    device: str,
    quiet: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Choose the bit-width of every layer: the least divergence within the size, exactly (Li et al. 2023, Eq. 8).

    The size is that of the packed file in bytes, everything included. Patterns are globs on layer names; one that
    matches nothing is an error. With --measure or --refine, the checkpoint is quantized as the answer says, and the
    divergence of its output is measured on audio that the sensitivities have not seen.

    \b
    Examples:
      mpq allocate sens.json --target-mb 7.5 --out alloc.json
      mpq allocate sens.json --average-bits 4 --keep 'decoder.*=8' --out alloc.json
      mpq allocate sens.json --target-ratio 8 --tie 'encoder.layers.*.self_attn.linear_[qkv].weight' --out alloc.json
      mpq allocate sens.json --max-divergence 0.15 --measure model.nemo --out alloc.json
      mpq allocate sens.json --target-mb 5 --refine model.nemo --minutes 5 --out alloc.json
    """
    from mpq import allocation as step
    from mpq.files import check_output
    from mpq.records import SensitivityTable
    from mpq.report import allocation_view

    if (data or points is not None or minutes is not None) and not (measure or refine):
        raise MpqError("--data, --points, --minutes: nothing is measured; give --measure or --refine CKPT with them")
    if measure and refine:
        raise MpqError("--measure and --refine: give one of them; --refine measures too")
    check_output(out, sensitivity)
    budgets = {
        "target_mb": target_mb,
        "target_ratio": target_ratio,
        "average_bits": average_bits,
        "max_divergence": max_divergence,
    }
    constraints = {
        "keep": {pattern: max(bits for other, bits in keep if other == pattern) for pattern, _ in keep},
        "exclude": exclude,
        "tie": tie,
        "whole_frontier": whole_frontier,
    }
    table = SensitivityTable.load(sensitivity)
    if checkpoint := measure or refine:
        from mpq.refine import allocate_measured

        allocation = allocate_measured(
            table,
            checkpoint,
            out,
            budgets,
            **constraints,
            points=5 if points is None else points,
            refine_minutes=(minutes or 10.0) if refine else 0,
            data=data,
            device=device,
            quiet=quiet,
        )
    else:
        allocation = step.allocate(table, **budgets, **constraints)
        allocation.save(out)
    _print(allocation, as_json, allocation_view(allocation))


@main.command()
@click.argument("checkpoint", type=EXISTING)
@click.option("--allocation", type=EXISTING, help="The bit-widths that `mpq allocate` chose.")
@click.option("--bits", type=click.IntRange(1, 8), help="One width for all layers instead.")
@click.option("--data", type=EXISTING, help="Calibration data; with --allocation, if not where that says.")
@click.option("--seconds", help="With --bits: use a random part of the data of this length, or all. Default: 300.")
@channel_options
@quantizer_options
@click.option("--out", required=True, type=EXISTING, help="The safetensors file to write.")
@common_options
def pack(
    checkpoint: Path,
    allocation: Path | None,
    bits: int | None,
    data: Path | None,
    seconds: str | None,
    channel: str,
    skip_bad: bool,
    out: Path,
    device: str,
    seed: int,
    quiet: bool,
    as_json: bool,
    **quantizer: Any,
) -> None:
    """Write the packed file: one safetensors file with all that is needed to run the model.

    Its size is what `mpq allocate` predicted, to the byte. Quantizer options and calibration data come from the
    allocation. The divergence of the file's output is measured, on audio that the sensitivities have not seen. With
    neither --allocation nor --bits, the weights are stored in --rest-dtype.

    \b
    Examples:
      mpq pack model.nemo --allocation alloc.json --out small.safetensors
      mpq pack model.nemo --bits 4 --data train.jsonl --out uniform4.safetensors
    """
    from mpq import pack as step
    from mpq.calibration import CALIBRATION_SECONDS
    from mpq.files import check_output
    from mpq.records import Allocation
    from mpq.report import pack_line

    if allocation is not None and bits is not None:
        raise MpqError("--allocation and --bits: give one of them")
    if allocation:
        check_output(out, allocation)
    chosen = Allocation.load(allocation) if allocation else None
    if (seconds or channel != "error" or skip_bad) and (data is None or (chosen and "sha256" in chosen.data)):
        why = "the allocation says which audio was used" if chosen else "no --data are given"
        raise MpqError(f"--seconds, --channel, --skip-bad: {why}; leave them out")
    result = step.pack(
        checkpoint,
        out,
        chosen,
        bits,
        given(quantizer),
        device,
        data=data,
        max_seconds=seconds_or_all(seconds, CALIBRATION_SECONDS),
        seed=seed,
        channel=channel,
        skip_bad=skip_bad,
        quiet=quiet,
    )
    _print(result, as_json, pack_line(result))


@main.command()
@click.argument("path", type=EXISTING)
@common_options
def inspect(path: Path, device: str, as_json: bool, **_: Any) -> None:
    """Show what is in a checkpoint or packed file: layers, shapes, bits, bytes, totals.

    \b
    Example:
      mpq inspect small.safetensors
    """
    from mpq import inspection
    from mpq.report import inspection_view

    result = inspection.inspect(path, device)
    _print(result, as_json, inspection_view(result))


@main.command()
@click.argument("folders", nargs=-1, type=EXISTING, metavar="[BASELINE COMPRESSED]")
@click.option("--ref", type=EXISTING, help="Reference transcripts (trn).")
@click.option("--a", "a_path", type=EXISTING, help="Transcripts of the baseline (trn).")
@click.option("--b", "b_path", type=EXISTING, help="Transcripts of the compressed system (trn).")
@click.option("--alpha", default=0.05, show_default=True, help="Level of the tests.")
@click.option("--resamples", default=10_000, show_default=True, help="Of the bootstrap.")
@click.option("--changes", default=5, show_default=True, help="How many changed outputs to show.")
@click.option("--out", type=EXISTING, help="Write the mpq.comparison/1 file, with all changed outputs.")
@common_options
def compare(
    folders: tuple[Path, ...],
    ref: Path | None,
    a_path: Path | None,
    b_path: Path | None,
    alpha: float,
    resamples: int,
    seed: int,
    changes: int,
    out: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Test whether the compressed system is significantly worse than the baseline.

    Word errors of both and their difference; MAPSSWE exactly as NIST SCTK's sc_stats, which decides "lossless"; the
    exact McNemar test; a bootstrap interval; the changed outputs. Differences are (errors of the baseline) - (errors
    of the compressed system) per segment, so a negative Z means that the baseline is better.

    \b
    Examples:
      mpq compare runs/fp32 runs/small
      mpq compare --ref ref.trn --a fp32.trn --b small.trn --out comparison.json
    """
    from mpq import compare as step
    from mpq.files import check_output
    from mpq.metrics import read_trn
    from mpq.report import changes_view, comparison_view

    files = (ref, a_path, b_path)
    if out:
        check_output(out, *files)
    if len(folders) == 2 and not any(files):
        transcripts = step.read_evaluations(*folders)
        names = (str(folders[0]), str(folders[1]))
    elif not folders and all(files):
        transcripts = tuple(read_trn(file) for file in files if file)
        names = (str(a_path), str(b_path))
    else:
        raise MpqError("expected two folders that mpq evaluate wrote, or --ref, --a and --b")
    result = step.compare(*transcripts, names=names, alpha=alpha, resamples=resamples, seed=seed)
    if out:
        result.save(out)
    views = [comparison_view(result)]
    if changes > 0 and result.changed:
        views.append(changes_view(result, changes))
    _print(result, as_json, *views)
