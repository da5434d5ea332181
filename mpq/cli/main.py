"""The command line: it parses, calls one function, and prints.

Everything else is imported inside the commands, so that `mpq --help` starts without torch.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mpq import __version__
from mpq.cli.compress import allocate, pack, sensitivity
from mpq.cli.messages import remembered_interrupt, say, shown_on_stderr, system_fault
from mpq.cli.options import (
    PATH,
    common_options,
    data_options,
    decode_options,
    print_result,
    set_option,
    unseeded_options,
)
from mpq.cli.streams import checked_stdout, open_streams
from mpq.cli.train import finetune, run, search, train
from mpq.errors import MpqError


class Cli(click.Group):
    """The border where errors become one line and an exit status: 2 bad input, 130 interrupted, 1 a fault of mpq."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            with open_streams(), shown_on_stderr(), remembered_interrupt():
                status = super().main(*args, **{**options, "standalone_mode": False})
        except MpqError as error:
            say(f"mpq: {error}")
            status = 2
        except OSError as error:  # whichever function met with it
            say(f"mpq: {system_fault(error)}")
            status = 2
        except MemoryError:
            say("mpq: not enough memory; give it more, or less to do")
            status = 2
        except click.ClickException as error:
            with suppress(OSError):  # a full stderr
                error.show()
            status = 2
        except (click.Abort, KeyboardInterrupt):
            say("mpq: interrupted; the same command goes on where it stopped")
            status = 130
        sys.exit(status if isinstance(status, int) else 0)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with checked_stdout():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with checked_stdout():
            return super().invoke(ctx)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mpq")
def main() -> None:
    """Make a trained speech recogniser as small as its device needs, and test that it is no worse.

    \b
    mpq evaluate    model.nemo --data dev.jsonl --out runs/fp32
    mpq sensitivity model.nemo --data train.jsonl --bits 2,3,4,5,6,8 --out sens.json
    mpq allocate    sens.json --target-mb 7.5 --out alloc.json
    mpq pack        model.nemo --allocation alloc.json --out small.safetensors
    mpq finetune    model.nemo --allocation alloc.json --train train.jsonl --dev dev.jsonl --out runs/qat
    mpq evaluate    small.safetensors --data dev.jsonl --out runs/small
    mpq compare     runs/fp32 runs/small
    """


@main.command()
@click.argument("checkpoint", type=PATH)
@data_options
@click.option("--out", required=True, type=PATH, help="The folder for hyp.trn, ref.trn, keys.json and metrics.json.")
@decode_options
@click.option("--batch-seconds", default=60.0, show_default=True, help="The most padded audio in one batch, seconds.")
@unseeded_options
def evaluate(
    checkpoint: Path,
    data: Path,
    out: Path,
    channel: str,
    skip_bad: bool,
    decode: str,
    beam_size: int,
    ctc_weight: float,
    length_bonus: float,
    batch_seconds: float,
    device: str,
    quiet: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Transcribe a test set and count the word errors.

    CHECKPOINT is a NeMo archive, a folder of `mpq train` or a file that `mpq pack` wrote. All faults of the data are
    reported before any work starts. A run that was cut off goes on where it stopped.

    \b
    Example:
      mpq evaluate stt_en_conformer_ctc_small.nemo --data dev.jsonl --out runs/fp32
    """
    from mpq.cli.tables import evaluation_view
    from mpq.scoring import evaluate as step
    from mpq.speech.decoding import DecodeOptions

    result = step.evaluate(
        checkpoint,
        data,
        out,
        decode=DecodeOptions(decode, beam_size, ctc_weight, length_bonus),
        max_batch_seconds=batch_seconds,
        channel=channel,
        skip_bad=skip_bad,
        device=device,
        quiet=quiet,
    )
    print_result(result, as_json, evaluation_view(result))


@main.command()
@click.argument("path", type=PATH)
@set_option
@unseeded_options
def inspect(path: Path, overrides: tuple[str, ...], device: str, as_json: bool, **_: Any) -> None:
    """Show what is in a checkpoint or packed file: layers, shapes, bits, bytes, totals; or what a recipe describes.

    \b
    Examples:
      mpq inspect small.safetensors
      mpq inspect recipes/swbd/swbd.toml --set model.ffn_width=5120 --set model.ffn_rank=160
    """
    from mpq.cli import inspection
    from mpq.cli.tables import inspection_view

    result = inspection.inspect(path, device, overrides)
    print_result(result, as_json, inspection_view(result))


@main.command()
@click.argument("folders", nargs=-1, type=PATH, metavar="[BASELINE COMPRESSED]...")
@click.option("--ref", type=PATH, help="The reference transcripts (trn).")
@click.option("--a", "a_path", type=PATH, help="The transcripts of the baseline (trn).")
@click.option("--b", "b_path", type=PATH, help="The transcripts of the compressed system (trn).")
@click.option("--alpha", default=0.05, show_default=True, help="The significance level of the tests.")
@click.option(
    "--margin",
    default=0.2,
    show_default=True,
    metavar="POINTS",
    help="The loss that is put up with, in points of word error rate; is it shown that the loss is smaller?",
)
@click.option("--by", metavar="KEY", help="A key of the manifest, such as speaker: the same question for each group.")
@click.option("--resamples", default=10_000, show_default=True, help="The number of resamples of the bootstrap.")
@click.option("--changes", default=5, show_default=True, help="The number of changed outputs to show.")
@click.option(
    "--out",
    type=PATH,
    help="The file to write, with all changed outputs: mpq.comparison/1, or mpq.comparisons/1 for several test sets.",
)
@common_options
def compare(
    folders: tuple[Path, ...],
    ref: Path | None,
    a_path: Path | None,
    b_path: Path | None,
    alpha: float,
    margin: float,
    by: str | None,
    resamples: int,
    seed: int,
    changes: int,
    out: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Test whether the compressed system is significantly worse than the baseline, and what the test set can show.

    The answer has the word errors of both systems and their difference; the MAPSSWE test exactly as in NIST SCTK's
    sc_stats, which decides "lossless"; how much worse it is at most, and whether that is within --margin; the loss that
    this test set would show four times in five; the exact McNemar test; a bootstrap interval; and the changed outputs.
    Differences are (errors of the baseline) - (errors of the compressed system) per segment, so a negative Z means that
    the baseline is better. With a pair of folders for each of several test sets there is a verdict on all of them, too.

    \b
    Examples:
      mpq compare runs/fp32 runs/small --margin 0.3 --by speaker
      mpq compare fp32/clean small/clean fp32/other small/other
      mpq compare --ref ref.trn --a fp32.trn --b small.trn --out comparison.json
    """
    from mpq.cli.comparisons import changes_view, comparison_view, comparisons_view
    from mpq.files import check_output
    from mpq.scoring import compare as step
    from mpq.scoring.groups import read_labels
    from mpq.speech.trn import read_trn

    files = (ref, a_path, b_path)
    if out:
        check_output(out, *files)
    pairs = list(zip(folders[::2], folders[1::2], strict=False))
    if folders and len(folders) % 2 == 0 and not any(files):
        transcripts = [step.read_evaluations(*pair) for pair in pairs]
    elif not folders and ref and a_path and b_path and not by:
        pairs, transcripts = [(a_path, b_path)], [(read_trn(ref), read_trn(a_path), read_trn(b_path))]
    else:
        raise MpqError(
            "expected two folders that mpq evaluate wrote (two for each test set), or --ref, --a and --b without --by"
        )
    results = [
        step.compare(
            *texts,
            (str(a), str(b)),
            alpha,
            resamples,
            seed,
            margin=margin / 100,
            labels=read_labels(a, by) if by else None,
        )
        for texts, (a, b) in zip(transcripts, pairs, strict=True)
    ]
    together = step.combine(results) if len(results) > 1 else None
    result = together or results[0]
    if out:
        result.save(out)
    views = []
    for one in results:
        views.append(comparison_view(one))
        if changes > 0 and one.changed:
            views.append(changes_view(one, changes))
    if together:
        views.append(comparisons_view(together))
    print_result(result, as_json, *views)


for command in (train, search, run, sensitivity, allocate, pack, finetune):
    main.add_command(command)
