"""The options that several commands share, which mean the same wherever a command takes them; printing of results."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource
from pydantic import BaseModel

from mpq.cli.messages import show_warnings_only
from mpq.cli.streams import has_unicode
from mpq.config.describe import describe_section
from mpq.config.types import DecodeMethod
from mpq.errors import MpqError
from mpq.quantization.spec import ROUNDINGS, SCALE_DTYPES, SCHEMES, QuantSpec, as_width


class _Path(click.Path):
    """A path whose name can be written down in the files that name it: JSON is UTF-8."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        _check_utf8(str(path.absolute()))
        return path


def _check_utf8(text: str) -> None:
    """Raises MpqError for a name that cannot be written down."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise MpqError(f"{shown}: the name is not UTF-8; rename the file or folder (mv, convmv)") from None


def _utf8(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        _check_utf8(value)
    return values


PATH = _Path(path_type=Path)


def _together(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _quiet(_: click.Context, __: click.Parameter, is_quiet: bool) -> bool:
    if is_quiet:
        show_warnings_only()
    return is_quiet


channel_options = _together(
    click.option(
        "--channel",
        default="error",
        show_default=True,
        metavar="error|mix|N",
        help="The channel of files with several: error refuses such files, mix takes the mean, a number picks one.",
    ),
    click.option("--skip-bad", is_flag=True, help="Leave faulty utterances out and count them."),
)
data_options = _together(
    click.option("--data", required=True, type=PATH, help="The data: a manifest (JSON lines) or Kaldi data directory."),
    channel_options,
)


def _common(seed: str) -> Callable[[Any], Any]:
    return _together(
        click.option(
            "--device", default="auto", show_default=True, help="The device to compute on: auto, cpu or cuda[:N]."
        ),
        click.option("--seed", default=0, show_default=True, help=seed),
        click.option(
            "--quiet", is_flag=True, callback=_quiet, help="Show no progress and no messages, except for warnings."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    )


common_options = _common("The seed of all random choices.")
unseeded_options = _common("Without effect here: this command draws nothing at random.")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    callback=_utf8,
    metavar="SECTION.KEY=VALUE",
    help="A value that replaces the recipe's.",
)
recipe_options = _together(
    click.argument("recipe", type=PATH),
    click.option("--out", required=True, type=PATH, help="The folder to write."),
    set_option,
)
decode_options = _together(
    click.option(
        "--decode",
        default="greedy",
        show_default=True,
        type=click.Choice(get_args(DecodeMethod)),
        help="The search: greedy CTC, CTC prefix beam search, or joint CTC/attention beam search.",
    ),
    click.option(
        "--beam-size", default=10, show_default=True, help="The number of hypotheses that a beam search keeps."
    ),
    click.option("--ctc-weight", default=0.3, show_default=True, help="The weight of the CTC in the joint search."),
    click.option(
        "--length-bonus", default=0.0, show_default=True, help="The joint search's bonus for each token, nats."
    ),
)
BUDGETS = {
    "target_mb": "Upper bound of the packed file's size; 1 MB is 2^20 bytes.",
    "target_ratio": "How many times smaller to be than with every layer at 32 bits.",
    "average_bits": "Upper bound of the average code bits per weight.",
    "max_divergence": "Make the smallest file with at most this divergence; with --measure, the measured one counts.",
}
"""The budgets of an allocation, of which one is given, with their help."""
budget_options = _together(
    *(click.option(f"--{name.replace('_', '-')}", type=float, help=text) for name, text in BUDGETS.items())
)
quantizer_options = _together(
    click.option(
        "--scheme", type=click.Choice(list(SCHEMES)), help=f"Kind of the levels. Default: {QuantSpec.scheme}."
    ),
    click.option(
        "--granularity", metavar="tensor|channel|group:G", help="Weights that share a scale. Default: group:64."
    ),
    click.option(
        "--clip", metavar="none|mse|mae|percentile:P", help="Choice of the range of the levels. Default: mse."
    ),
    click.option(
        "--rounding",
        type=click.Choice(list(ROUNDINGS)),
        help="gptq makes up for errors by what the layers see of the data. It is the default where there are data and "
        "the scheme has it; otherwise nearest is.",
    ),
    click.option("--scale-dtype", type=click.Choice(SCALE_DTYPES), help="Type of the stored scales. Default: float16."),
    click.option(
        "--rest-dtype",
        type=click.Choice(["float16", "float32", "coded"]),
        help="Type of what is not quantized (biases, norms). Default: coded for the scheme entropy, otherwise float16.",
    ),
)


def section_options(section: type[BaseModel], without: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Returns options for the keys of a section of a recipe; a command gets their texts, None for those not given."""
    options = []
    for key, kind, default, description in describe_section(section):
        if key in without:
            continue
        flag = f"--{key.replace('_', '-')}"
        shown = f"{description} Default: {default}." if default else description
        options.append(click.option(flag, key, metavar=kind.replace("\\", "").upper(), help=shown))
    return _together(*options)


def with_seed(overrides: Sequence[str]) -> list[str]:
    """Returns the --set options of a command that follows a recipe, and --seed as one more if it was given."""
    context = click.get_current_context()
    is_given = context.get_parameter_source("seed") is ParameterSource.COMMANDLINE
    return [*overrides, *([f"seed={context.params['seed']}"] if is_given else [])]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the quantizer options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def seconds_or_all(text: str | None, default: float) -> float | None:
    """Returns the number of seconds that an option says, None for "all"."""
    try:
        return default if text is None else None if text == "all" else float(text)
    except ValueError:
        raise MpqError(f"--seconds: expected a number or all, got {text!r}") from None


class Widths(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A list of numbers such as 2,3,4,8 or 1.4,1.8."""

    def __init__(self, name: str = "2,3,4,...") -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return value if isinstance(value, list) else [as_width(float(item)) for item in value.split(",")]
        except (ValueError, OverflowError):
            self.fail(f"expected numbers with commas between them, got {value!r}", param, ctx)


class PatternBits(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A pattern and a number of bits, PATTERN=BITS."""

    name = "PATTERN=BITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        pattern, equals, bits = value.rpartition("=")
        if not (pattern and equals and re.fullmatch(r"[0-9]+(\.[0-9]+)?", bits)):
            self.fail(f"expected PATTERN=BITS such as 'decoder.*=8', got {value!r}", param, ctx)
        return pattern, as_width(float(bits))


def print_result(result: Any, as_json: bool, *views: Any) -> None:
    """Prints a result on stdout: as JSON, or its views for a person."""
    if as_json:
        print(json.dumps(result.to_json(), ensure_ascii=not has_unicode()))
        return
    from mpq.cli.tables import console

    for view in views:
        console().print(view, soft_wrap=isinstance(view, str))


def print_once(result: Any, as_json: bool, *views: Any) -> None:
    """Prints a result in one of the processes that torchrun started."""
    if int(os.environ.get("RANK", "0")) == 0 or "TORCHELASTIC_RUN_ID" not in os.environ:
        print_result(result, as_json, *views)
