"""What a person reads: the tables and lines of results, from records alone."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from rich.console import Console, RenderableType

from mpq.allocation.pack import PackResult
from mpq.allocation.records import Allocation
from mpq.cli.options import print_result
from mpq.cli.tables import allocation_view, console, pack_line, sensitivity_view
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable

MB = 2**20


def shown(view: RenderableType) -> str:
    out = Console(width=160, highlight=False, markup=False, emoji=False)
    with out.capture() as capture:
        out.print(view)
    return capture.get()


def layer(name: str, kl: dict[int, float]) -> LayerSensitivity:
    return LayerSensitivity(name, "linear", (10,), 10, dict.fromkeys(kl, 4), kl)


TABLE = SensitivityTable(
    layers=(layer("a", {2: 0.01, 4: 0.003}), layer("[b]", {2: 0.5, 4: 0.001}), layer("c", {2: 0.2, 4: 0.002})),
    bits=(2, 4),
    fixed_bytes=1,
    data={"path": "x.jsonl", "utterances": 3, "frames": 50, "left_seconds": 0},
)
ALLOCATION = Allocation(
    bits={"a": 2, "b": 4, "c": 4},
    target_bytes=2 * MB,
    predicted_bytes=MB,
    predicted_kl=0.25,
    average_bits=3.5,
    frontier=((1, 2.0), (MB, 0.25)),
    frontier_note="every trade-off",
)
PACKED = PackResult(
    Path("m"), MB, MB, 2 * MB, MB // 2, 8 * MB, 3.5, "gptq", 0.25, 0.125, "30 s of x.jsonl", "asymmetric"
)


def test_a_console_that_is_no_terminal_is_wide() -> None:
    assert console().width == 160


def test_the_most_sensitive_layers_come_first() -> None:
    text = shown(sensitivity_view(TABLE, most=2))
    assert "KL divergence of the ctc output, nats per frame, measured one layer at a time: the 2 most sensitive" in text
    assert text.index("[b]") < text.index("│ c ")
    assert "│ a " not in text
    assert "7.10e-01" in text and "6.00e-03" in text and "│      30 │" in text  # the sums are those of all layers
    assert "3 utterances, 50 frames of x.jsonl; nothing is left of it to measure a whole model on" in text
    text = shown(sensitivity_view(replace(TABLE, method="fisher", output="decoder", data={"left_seconds": 3.0})))
    assert "nats per token, to second order" in text and "nothing is left" not in text


def test_an_allocation_says_its_size_and_what_was_measured() -> None:
    text = shown(allocation_view(ALLOCATION))
    assert f"{MB} bytes (1.000 MB) of at most {2 * MB} (2.000 MB)" in text
    assert "not measured (--measure CKPT does)" in text and "frontier: 2 points; every trade-off" in text
    done = {"moves": 3, "before": 0.5, "after": 0.4, "seconds": 30.0, "measured_before": 0.55}
    measured = ((MB, 0.25, 0.45), (2 * MB, 0.125, 0.35))
    text = shown(
        allocation_view(
            replace(ALLOCATION, measured=measured, measured_kl=0.45, measured_seconds=20.0, refinement=done)
        )
    )
    assert "measured 0.45 (all layers together, a frame at most 1) on 20 s" in text
    assert "refined by 3 moves: 0.5 -> 0.4 on the 30 s that decided on them, 0.55 -> 0.45 on those that did not" in text
    assert "│        0.125 │        0.35 │" in text


def test_a_packed_file_in_two_lines() -> None:
    first, second = pack_line(PACKED).splitlines()
    assert first == (
        f"m: {MB} bytes (1.000 MB), 8.00 times smaller than float32, 3.500 bits a weight (nominally 0.500 MB); "
        f"predicted {MB}, at most {2 * MB}"
    )
    assert second == (
        "rounding gptq; divergence, nats per frame: predicted 0.25 (sum over the layers), measured 0.125 (all layers "
        "together, a frame at most 1) on 30 s of x.jsonl"
    )
    alone = replace(
        PACKED, predicted_bytes=None, target_bytes=None, predicted_kl=None, measured_kl=None, measured_on="?"
    )
    assert "predicted" not in pack_line(alone) and pack_line(alone).endswith("nats per frame: not measured: ?")


@dataclass(frozen=True)
class Answer:
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text}


def printed(*arguments: str) -> str:
    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def command(as_json: bool) -> None:
        print_result(Answer("naïve [bold] " + 200 * "x"), as_json, "a view [bold]", "another")

    return CliRunner().invoke(command, arguments).stdout


def test_a_result_is_printed_as_json_or_in_words() -> None:
    assert json.loads(printed("--json")) == {"text": "naïve [bold] " + 200 * "x"}
    assert printed("--json").count("\n") == 1 and "naïve" in printed("--json")
    assert printed() == "a view [bold]\nanother\n"
