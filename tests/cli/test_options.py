"""Options that several commands share, and how a result is printed."""

import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from tiny_cli import fails, run

from mpq.cli.main import main
from mpq.cli.options import (
    PatternBits,
    Widths,
    given,
    print_once,
    print_result,
    seconds_or_all,
    section_options,
    with_seed,
)
from mpq.config import SearchConfig
from mpq.errors import MpqError


def test_widths_are_numbers_with_commas() -> None:
    assert Widths().convert("2,3,8", None, None) == [2, 3, 8]
    assert Widths().convert("1.4,2.0,3", None, None) == [1.4, 2, 3]
    for text in ("", "2,", "2;3", "2.5x"):
        with pytest.raises(click.BadParameter, match="expected numbers with commas between them"):
            Widths().convert(text, None, None)


def test_a_pattern_may_have_an_equals_sign() -> None:
    assert PatternBits().convert("decoder.*=8", None, None) == ("decoder.*", 8)
    assert PatternBits().convert("a=b=4", None, None) == ("a=b", 4)
    assert PatternBits().convert("decoder.*=2.6", None, None) == ("decoder.*", 2.6)
    for text in ("decoder", "=8", "decoder=", "decoder=-1", "decoder=4.", "decoder=٤"):
        with pytest.raises(click.BadParameter, match=r"expected PATTERN=BITS such as 'decoder\.\*=8'"):
            PatternBits().convert(text, None, None)


def test_seconds_or_all() -> None:
    assert seconds_or_all(None, 60.0) == 60.0 and seconds_or_all("1.5", 60.0) == 1.5
    assert seconds_or_all("all", 60.0) is None
    with pytest.raises(MpqError, match="--seconds: expected a number or all, got 'many'"):
        seconds_or_all("many", 60.0)


def test_only_what_was_given_is_passed_on() -> None:
    assert given({"scheme": None, "clip": "mse", "bits": 0}) == {"clip": "mse", "bits": 0}


@dataclass(frozen=True)
class Answer:
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text}


def printed(*arguments: str, **environment: str) -> str:
    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    @click.option("--once", is_flag=True)
    def command(as_json: bool, once: bool) -> None:
        (print_once if once else print_result)(Answer("naïve [bold] " + 200 * "x"), as_json, "a view [bold]", "another")

    return CliRunner().invoke(command, arguments, env=environment).stdout


def test_a_result_is_printed_as_json_or_in_words() -> None:
    assert json.loads(printed("--json")) == {"text": "naïve [bold] " + 200 * "x"}
    assert printed("--json").count("\n") == 1 and "naïve" in printed("--json")
    assert printed() == "a view [bold]\nanother\n"


def test_one_of_several_processes_prints() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none"}
    assert printed("--once") == printed("--once", RANK="0", **torchrun) == printed("--once", RANK="1") == printed()
    assert printed("--once", RANK="1", **torchrun) == ""


def test_a_section_has_an_option_for_each_key() -> None:
    @click.command()
    @section_options(SearchConfig, without=("trained",))
    def command(**_: object) -> None: ...

    assert {option.name for option in command.params} == set(SearchConfig.model_fields) - {"trained"}


@pytest.mark.parametrize(("arguments", "expected"), [([], ["a=1"]), (["--seed", "0"], ["a=1", "seed=0"])])
def test_a_seed_that_is_given_replaces_the_recipes(arguments: list[str], expected: list[str]) -> None:
    @click.command()
    @click.option("--seed", default=0)
    def command(seed: int) -> None:
        assert with_seed(["a=1"]) == expected

    command.main(arguments, standalone_mode=False)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_name_that_is_not_utf8_is_refused_before_the_work(place: str, tmp_path: Path, tiny_archive: Path) -> None:
    name = os.fsdecode(b"m\xf6")
    path = tmp_path / (name if place == "file" else f"{name}/data")
    options = ["--data", path, "--out", tmp_path / "out"]
    fails("evaluate", tiny_archive, *options, words="/m\\xf6")
    fails("evaluate", tiny_archive, "--data", tmp_path, "--out", path, words="the name is not UTF-8; rename the file")
    assert not (tmp_path / "out").exists()
    fails("inspect", tiny_archive, "--set", f"data.dev={name}", words="data.dev=m\\xf6: the name is not UTF-8")


def test_a_seed_without_effect_says_so() -> None:
    for name, command in main.commands.items():
        has_effect = name not in ("allocate", "evaluate", "inspect")
        assert ("Without effect here" in run(name, "--help").stdout) is not has_effect, name
        if not has_effect:
            assert command.callback is not None and "seed" not in inspect.signature(command.callback).parameters
