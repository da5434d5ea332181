"""The command line: it parses, calls one function, prints. Everything else is imported inside the commands, so that
`mpq --help` starts without torch."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mpq import __version__
from mpq.errors import MpqError

EXISTING = click.Path(path_type=Path)


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


def _together(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


data_options = _together(
    click.option("--data", required=True, type=EXISTING, help="Manifest (JSON lines) or Kaldi data directory."),
    click.option(
        "--channel", default="error", show_default=True, help="Of several: error, mix (their mean), 0, 1, ..."
    ),
    click.option("--skip-bad", is_flag=True, help="Leave faulty utterances out, and count them."),
)
common_options = _together(
    click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N]."),
    click.option("--seed", default=0, show_default=True, help="Of whatever is drawn at random."),
    click.option("--quiet", is_flag=True, help="Show no progress."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
)
quantizer_options = _together(
    click.option("--scheme", type=click.Choice(["symmetric", "asymmetric"]), help="Default: asymmetric."),
    click.option("--granularity", metavar="tensor|channel|group:G", help="What shares a scale. Default: group:64."),
    click.option("--clip", metavar="none|mse|mae|percentile:P", help="How the range is chosen. Default: mse."),
    click.option("--rounding", type=click.Choice(["nearest"]), help="Default: nearest."),
    click.option("--scale-dtype", type=click.Choice(["float16", "float32"]), help="Of the scales. Default: float16."),
    click.option(
        "--rest-dtype",
        type=click.Choice(["float16", "float32"]),
        help="Of what is not quantized (biases, norms). Default: float16.",
    ),
)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the quantizer options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def _print(result: Any, as_json: bool, *views: Any) -> None:
    if as_json:
        click.echo(json.dumps(result.to_json(), ensure_ascii=False))
        return
    from mpq.report import console

    for view in views:
        console().print(view, soft_wrap=isinstance(view, str))


class Widths(click.ParamType):
    """A list such as 2,3,4,8."""

    name = "2,3,4,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return value if isinstance(value, list) else [int(item) for item in value.split(",")]
        except ValueError:
            self.fail(f"expected whole numbers with commas between them, got {value!r}", param, ctx)


class PatternBits(click.ParamType):
    """PATTERN=BITS."""

    name = "PATTERN=BITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        pattern, equals, bits = value.rpartition("=")
        if not (pattern and equals and re.fullmatch("[0-9]+", bits)):
            self.fail(f"expected PATTERN=BITS such as 'decoder.*=8', got {value!r}", param, ctx)
        return pattern, int(bits)


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
@click.option("--method", default="kl", show_default=True, type=click.Choice(["kl"]), help="kl: one at a time, exact.")
@click.option(
    "--seconds", default="60", show_default=True, help="Use a random part of the data of this length, or all."
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
    seconds: str,
    seed: int,
    as_json: bool,
    **quantizer: Any,
) -> None:
    """Measure how much the output suffers from each layer at each bit-width (Li et al. 2023, Eq. 7).

    Exact: one layer at a time is quantized and the output distributions are compared, KL divergence per frame. A run
    that was cut off goes on where it stopped; with more --bits only the new ones are measured. Transcripts are not
    used. Under torchrun the processes of one machine share the work.

    \b
    Example:
      mpq sensitivity model.nemo --data train.jsonl --bits 2,3,4,5,6,8 --out sens.json
    """
    from mpq.artifact import Storage
    from mpq.report import sensitivity_view
    from mpq.sensitivity import measure_sensitivity

    try:
        max_seconds = None if seconds == "all" else float(seconds)
    except ValueError:
        raise MpqError(f"--seconds: expected a number or all, got {seconds!r}") from None
    table = measure_sensitivity(
        checkpoint,
        data,
        bits,
        out,
        Storage.from_json(_given(quantizer)),
        output=output,
        max_seconds=max_seconds,
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
@click.option("--keep", multiple=True, type=PatternBits(), help="At least BITS for the layers that match.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave the layers that match unquantized.")
@click.option("--tie", multiple=True, metavar="PATTERN", help="One width for layers that differ in no * of PATTERN.")
@click.option("--whole-frontier", is_flag=True, help="List every trade-off, also where that takes seconds.")
@click.option("--out", required=True, type=EXISTING, help="The mpq.allocation/1 file to write.")
@common_options
def allocate(
    sensitivity: Path,
    target_mb: float | None,
    target_ratio: float | None,
    average_bits: float | None,
    keep: tuple[tuple[str, int], ...],
    exclude: tuple[str, ...],
    tie: tuple[str, ...],
    whole_frontier: bool,
    out: Path,
    as_json: bool,
    **_: Any,
) -> None:
    """Choose the bit-width of every layer: the least divergence within the size, exactly (Li et al. 2023, Eq. 8).

    The size is that of the packed file in bytes, everything included. Patterns are globs on layer names; one that
    matches nothing is an error.

    \b
    Examples:
      mpq allocate sens.json --target-mb 7.5 --out alloc.json
      mpq allocate sens.json --average-bits 4 --keep 'decoder.*=8' --out alloc.json
      mpq allocate sens.json --target-ratio 8 --tie 'encoder.layers.*.self_attn.linear_[qkv].weight' --out alloc.json
    """
    from mpq.allocation import allocate as solve
    from mpq.files import check_output
    from mpq.records import SensitivityTable
    from mpq.report import allocation_view

    check_output(out, sensitivity)
    allocation = solve(
        SensitivityTable.load(sensitivity),
        target_mb=target_mb,
        target_ratio=target_ratio,
        average_bits=average_bits,
        keep={pattern: max(bits for other, bits in keep if other == pattern) for pattern, _ in keep},
        exclude=exclude,
        tie=tie,
        whole_frontier=whole_frontier,
    )
    allocation.save(out)
    _print(allocation, as_json, allocation_view(allocation))


@main.command()
@click.argument("checkpoint", type=EXISTING)
@click.option("--allocation", type=EXISTING, help="The bit-widths that `mpq allocate` chose.")
@click.option("--bits", type=click.IntRange(1, 8), help="One width for all layers instead.")
@quantizer_options
@click.option("--out", required=True, type=EXISTING, help="The safetensors file to write.")
@common_options
def pack(
    checkpoint: Path,
    allocation: Path | None,
    bits: int | None,
    out: Path,
    device: str,
    seed: int,
    quiet: bool,
    as_json: bool,
    **quantizer: Any,
) -> None:
    """Write the packed file: one safetensors file with all that is needed to run the model.

    Its size is what `mpq allocate` predicted, to the byte. Quantizer options come from the allocation. With neither
    --allocation nor --bits, the weights are stored in --rest-dtype.

    \b
    Examples:
      mpq pack model.nemo --allocation alloc.json --out small.safetensors
      mpq pack model.nemo --bits 4 --out uniform4.safetensors
    """
    from mpq import pack as step
    from mpq.records import Allocation
    from mpq.report import pack_line

    if allocation is not None and bits is not None:
        raise MpqError("--allocation and --bits: give one of them")
    chosen = Allocation.load(allocation) if allocation else None
    result = step.pack(checkpoint, out, chosen, bits, _given(quantizer), device)
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
