"""The commands that compress: sensitivity, allocate, pack."""

from pathlib import Path
from typing import Any, get_args

import click

from mpq.cli.options import (
    BUDGETS,
    PATH,
    PatternBits,
    Widths,
    budget_options,
    channel_options,
    common_options,
    data_options,
    given,
    print_once,
    print_result,
    quantizer_options,
    seconds_or_all,
    unseeded_options,
)
from mpq.config.types import Output, ScoreMethod
from mpq.errors import MpqError
from mpq.quantization.spec import MAX_BITS, MIN_RATE, RATES, as_width, scheme_and_widths


@click.command()
@click.argument("checkpoint", type=PATH)
@data_options
@click.option(
    "--bits",
    type=Widths(),
    help="Bit-widths to measure, 1 to 8, of codes that all take so many bits. Default with another --scheme, "
    "--granularity or --clip than that of rates: 2,3,4,5,6,8.",
)
@click.option(
    "--rates",
    type=Widths("1.4,1.8,..."),
    help=f"Nominal rates to measure, {MIN_RATE} to {MAX_BITS} bits a weight, of codes that are entropy-coded. "
    f"Default, unless --bits are given: {', '.join(map(str, RATES[:3]))} ... {RATES[-1]}.",
)
@click.option("--out", required=True, type=PATH, help="The mpq.sensitivity/1 file to write.")
@quantizer_options
@click.option(
    "--output",
    default="ctc",
    show_default=True,
    type=click.Choice(get_args(Output)),
    help="The output whose divergence is measured.",
)
@click.option(
    "--method",
    default="fisher",
    show_default=True,
    type=click.Choice(get_args(ScoreMethod)),
    help="fisher: second order, fast; kl: one layer at a time, exact (Li et al. 2023, Eq. 7).",
)
@click.option(
    "--seconds", help="Use a random part of the data of this length, or all. Default: 300 (fisher) or 60 (kl)."
)
@click.option(
    "--vary/--no-vary",
    "is_varied",
    default=None,
    help="Cut half of the audio into pieces, half of these at half the bandwidth, which is kinder to speech of other "
    "kinds. Default: for the scheme entropy.",
)
@common_options
def sensitivity(
    checkpoint: Path,
    data: Path,
    bits: list[float] | None,
    rates: list[float] | None,
    out: Path,
    channel: str,
    skip_bad: bool,
    device: str,
    quiet: bool,
    output: str,
    method: str,
    seconds: str | None,
    is_varied: bool | None,
    seed: int,
    as_json: bool,
    **quantizer: Any,
) -> None:
    """Measure how much the output suffers from each layer at each bit-width: KL divergence per frame, in nats.

    A run that was cut off goes on where it stopped; with more --bits or --rates only the new ones are measured.
    Transcripts are not used. Under torchrun the processes of one machine share the work.

    \b
    Examples:
      mpq sensitivity model.nemo --data train.jsonl --out sens.json
      mpq sensitivity model.nemo --data train.jsonl --bits 2,3,4,5,6,8 --out sens.json
    """
    from mpq.artifact.weights import WeightFormat
    from mpq.cli.tables import sensitivity_view
    from mpq.sensitivity.measure import METHODS, measure_sensitivity

    has_ranges = bool(quantizer["granularity"] or quantizer["clip"])
    scheme, widths = scheme_and_widths(quantizer["scheme"], bits, rates, has_ranges)
    table = measure_sensitivity(
        checkpoint,
        data,
        widths,
        out,
        WeightFormat.from_options(given(quantizer | {"scheme": scheme})),
        method=method,
        output=output,
        max_seconds=seconds_or_all(seconds, METHODS[method]),
        seed=seed,
        channel=channel,
        skip_bad=skip_bad,
        is_varied=is_varied,
        device=device,
        quiet=quiet,
    )
    print_once(table, as_json, sensitivity_view(table))


@click.command()
@click.argument("sensitivity", type=PATH)
@budget_options
@click.option("--keep", multiple=True, type=PatternBits(), help="Give the layers that match at least BITS.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave the layers that match unquantized.")
@click.option(
    "--tie", multiple=True, metavar="PATTERN", help="Give layers that match with the same text for each * one width."
)
@click.option("--whole-frontier", is_flag=True, help="List every trade-off, also where that takes seconds.")
@click.option(
    "--measure", type=PATH, metavar="CKPT", help="Measure the answer with all layers of this model quantized."
)
@click.option("--refine", type=PATH, metavar="CKPT", help="Measure the answer too, and look for moves to better it.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Minutes to look for moves. Default: 10.")
@click.option("--points", type=click.IntRange(0, 1000), help="Number of sizes of the frontier to measure. Default: 5.")
@click.option("--data", type=PATH, help="The calibration data, if they were moved since.")
@click.option("--out", required=True, type=PATH, help="The mpq.allocation/1 file to write.")
@unseeded_options
def allocate(
    sensitivity: Path,
    measure: Path | None,
    refine: Path | None,
    minutes: float | None,
    points: int | None,
    data: Path | None,
    out: Path,
    device: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
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
    from mpq.allocation.decisions import Constraints
    from mpq.allocation.solve import one_budget, solve
    from mpq.cli.tables import allocation_view
    from mpq.files import check_output
    from mpq.sensitivity.records import SensitivityTable

    checkpoint = _measured(measure, refine, has_options=bool(data or points is not None or minutes is not None))
    check_output(out, sensitivity)
    budgets = {name: options[name] for name in BUDGETS}
    highest = dict(sorted(options["keep"]))  # of the floors that are given for one pattern
    constraints = Constraints(highest, options["exclude"], options["tie"])
    table = SensitivityTable.load(sensitivity)
    if checkpoint:
        from mpq.allocation.moves import Effort
        from mpq.allocation.refine import allocate_measured

        allocation = allocate_measured(
            table,
            checkpoint,
            out,
            budgets,
            constraints,
            whole_frontier=options["whole_frontier"],
            points=5 if points is None else points,
            effort=Effort(seconds=60 * (minutes or 10.0)) if refine else None,
            data=data,
            device=device,
            quiet=quiet,
        )
    else:
        allocation = solve(table, one_budget(budgets), constraints, options["whole_frontier"])
        allocation.save(out)
    print_result(allocation, as_json, allocation_view(allocation))


def _measured(measure: Path | None, refine: Path | None, has_options: bool) -> Path | None:
    """Returns the checkpoint that an allocation is measured on; None where it is not measured.

    Raises:
        MpqError: Both options are given, or neither while there are other options of a measurement.
    """
    if has_options and not (measure or refine):
        raise MpqError("--data, --points, --minutes: nothing is measured; give --measure or --refine CKPT with them")
    if measure and refine:
        raise MpqError("--measure and --refine: give one of them; --refine measures too")
    return measure or refine


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--allocation", type=PATH, help="The bit-widths that `mpq allocate` chose.")
@click.option(
    "--bits", type=float, help="Give all layers this width instead; with --scheme entropy, this rate, such as 2.5."
)
@click.option("--data", type=PATH, help="Calibration data; with --allocation, needed only if they were moved.")
@click.option("--seconds", help="With --bits: use a random part of the data of this length, or all. Default: 300.")
@channel_options
@quantizer_options
@click.option("--out", required=True, type=PATH, help="The safetensors file to write.")
@common_options
def pack(
    checkpoint: Path,
    allocation: Path | None,
    bits: float | None,
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
    from mpq.allocation import pack as step
    from mpq.allocation.records import Allocation
    from mpq.cli.tables import pack_line
    from mpq.files import check_output
    from mpq.sensitivity.calibration import CALIBRATION_SECONDS

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
        None if bits is None else as_width(bits),
        given(quantizer),
        device,
        data=data,
        max_seconds=seconds_or_all(seconds, CALIBRATION_SECONDS),
        seed=seed,
        channel=channel,
        skip_bad=skip_bad,
        quiet=quiet,
    )
    print_result(result, as_json, pack_line(result))
