"""What the options of several commands mean: declared once, so that they are the same wherever a command takes them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mpq.errors import MpqError

EXISTING = click.Path(path_type=Path)


def _together(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


channel_options = _together(
    click.option(
        "--channel", default="error", show_default=True, help="Of several: error, mix (their mean), 0, 1, ..."
    ),
    click.option("--skip-bad", is_flag=True, help="Leave faulty utterances out, and count them."),
)
data_options = _together(
    click.option("--data", required=True, type=EXISTING, help="Manifest (JSON lines) or Kaldi data directory."),
    channel_options,
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
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "gptq"]),
        help="gptq makes up for errors by what the layers see of the data. Default: gptq; pack without data: nearest.",
    ),
    click.option("--scale-dtype", type=click.Choice(["float16", "float32"]), help="Of the scales. Default: float16."),
    click.option(
        "--rest-dtype",
        type=click.Choice(["float16", "float32"]),
        help="Of what is not quantized (biases, norms). Default: float16.",
    ),
)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the quantizer options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def seconds_or_all(text: str | None, default: float) -> float | None:
    """Returns the number of seconds that an option says, None for "all"."""
    try:
        return default if text is None else None if text == "all" else float(text)
    except ValueError:
        raise MpqError(f"--seconds: expected a number or all, got {text!r}") from None


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
