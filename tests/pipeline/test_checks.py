"""Faults that would come to light only after the training, told before anything starts."""

import json
from pathlib import Path

import pytest
from tiny_recipes import good

from mpq.errors import MpqError
from mpq.pipeline.checks import check_run
from mpq.pipeline.read import load_recipe

__all__ = ["good"]  # a fixture


@pytest.fixture
def faulty(good: Path) -> Path:
    """The folder of that recipe, with data that lack transcripts (bare.jsonl) or are none (bad.jsonl, worse.jsonl)."""
    folder = good.parent
    (folder / "bare.jsonl").write_text(json.dumps({"audio_filepath": "dev-0.wav"}) + "\n")
    (folder / "bad.jsonl").write_text('{"audio_filepath": 3}\n')
    (folder / "worse.jsonl").write_text("x\n")
    return folder


def check(folder: Path, *overrides: str, device: str = "cpu") -> None:
    check_run(load_recipe(folder / "r.toml", overrides), device)


SEARCH = "search.eta=1"
FINETUNE = 'stages=["train","sensitivity","allocate","finetune"]'


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.test.one=bad.jsonl"], ["bad.jsonl:1: "]),
        (
            ["data.test.one=bad.jsonl", "data.calibration=worse.jsonl", "sensitivity.clip=percentile:9"],
            ["bad.jsonl:1: ", "worse.jsonl:1: ", "[sensitivity] clip: expected none, mse, mae or percentile:P"],
        ),
        (
            [FINETUNE, "data.dev=bare.jsonl", "train.select=last", "finetune.select=wer"],
            ['[finetune] select: "wer" needs transcripts in bare.jsonl, which has none'],
        ),
        (
            [FINETUNE, "data.train=['bare.jsonl']", "finetune.transcript_weight=0.5"],
            ["[finetune] transcript_weight: 0.5 needs transcripts in bare.jsonl, which has none"],
        ),
        (
            [SEARCH, 'stages=["search"]', "search.held_out=bare.jsonl"],
            ['[search] held_out: "bare.jsonl" needs transcripts in bare.jsonl, which has none'],
        ),
        (
            [SEARCH, 'stages=["train","search"]', "search.trained=true", "search.ffn_width=[8,4096]", "model.layers=1"],
            ["[search] ffn_width: expected candidates up to 2048, the width of block 1's first", "of block 1's second"],
        ),
        (
            [SEARCH, 'stages=["search"]', "search.space=both", "search.ffn_rank=[4,300]", "model.layers=1"],
            ["[search] ffn_rank: expected ranks up to 256, the smaller side of block 1's first", "of block 1's second"],
        ),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(faulty: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(MpqError) as caught:
        check(faulty, *overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(words), lines
    assert all(any(word in line for line in lines) for word in words), lines


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [FINETUNE, "data.dev=bare.jsonl", "train.select=last", "finetune.transcript_weight=0.5"],
        [SEARCH, 'stages=["search"]', "search.ffn_width=[8,4096]"],  # from scratch they may be larger
        ['stages=["train"]', "data.test.one=bad.jsonl"],  # which no stage reads
    ],
)
def test_a_sound_recipe_passes(faulty: Path, overrides: list[str]) -> None:
    check(faulty, *overrides)


def test_a_device_that_is_none_is_refused(faulty: Path) -> None:
    with pytest.raises(MpqError, match="--device"):
        check(faulty, device="tpu")


def test_two_processes_are_refused(faulty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(faulty)  # it may be another tool's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(MpqError, match="mpq run is one process; train with torchrun"):
        check(faulty)
