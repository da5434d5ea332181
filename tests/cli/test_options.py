"""Options that several commands share."""

import click
import pytest

from mpq.cli.options import PatternBits, Widths, given, print_once, seconds_or_all, section_options, with_seed
from mpq.config import SearchConfig
from mpq.errors import MpqError


class Result:
    def to_json(self) -> dict[str, str]:
        return {"text": "é"}


def test_widths_and_patterns() -> None:
    assert Widths().convert("2,3,8", None, None) == [2, 3, 8]
    assert PatternBits().convert("decoder.*=8", None, None) == ("decoder.*", 8)
    assert PatternBits().convert("a=b=4", None, None) == ("a=b", 4)
    for kind, text in ((Widths(), "2,x"), (Widths(), ""), (PatternBits(), "decoder"), (PatternBits(), "=8")):
        with pytest.raises(click.BadParameter, match="expected"):
            kind.convert(text, None, None)


def test_seconds() -> None:
    assert (seconds_or_all(None, 60), seconds_or_all("all", 60), seconds_or_all("2.5", 60)) == (60, None, 2.5)
    with pytest.raises(MpqError, match="--seconds: expected a number or all, got 'some'"):
        seconds_or_all("some", 60)


def test_what_was_not_given_is_left_out() -> None:
    assert given({"scheme": "mulaw", "clip": None}) == {"scheme": "mulaw"}


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


def test_one_of_torchruns_processes_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        print_once(Result(), True)
    assert capsys.readouterr().out == '{"text": "é"}\n'
