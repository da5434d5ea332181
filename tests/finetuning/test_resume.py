"""Fine-tuning that was stopped or killed ends as if it had not been: same files, same log, same result."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_finetune import (
    NEAREST,
    assert_same_training,
    speech,
    tune,
    tuning_recipe,
    with_data,
    write_allocation,
)
from tiny_training import CrashError, fails_at, some_always

from mpq.artifact.weights import WeightFormat
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.finetuning import loop as finetune_loop
from mpq.finetuning.loop import Finetuner
from mpq.finetuning.record import FinetuneResult
from mpq.quantization.spec import QuantSpec
from mpq.training.loop import TrainingLoop

__all__ = ["speech"]  # a fixture

MULAW = WeightFormat(QuantSpec(8, "mulaw", "channel", rounding="nearest"))
CASES: dict[str, tuple[tuple[int, ...], WeightFormat, dict[str, Any]]] = {
    "all": (
        (4, 2), replace(NEAREST, spec=replace(NEAREST.spec, granularity="group:8")),
        {"scales": "recomputed", "search_every": 2, "ema": 0.9, "average": 3, "select": "loss",
         "finetune_augment": {"speed": [0.9, 1.0, 1.1], "noise": ["white"], "level_db": [-6.0, 6.0]}},
    ),
    "mulaw": ((3,), MULAW, {"search_every": 2, "alpha": [20.0, 300.0], "anneal": [0.0, 0.9]}),
    "learned": (
        (3, 2), NEAREST,
        {"transcript_weight": 0.4, "dropout": True, "batch_norm": "updated", "ema": 0.5, "accumulate": 2,
         "batch_frames": 130},
    ),
    "frozen": ((2,), NEAREST, {"scales": "frozen", "select": "wer", "schedule": "linear", "warmup_steps": 0}),
}  # fmt: skip


class Case:
    """A fine-tuning and where it was done without an interruption."""

    def __init__(self, name: str, speech: Path, folder: Path) -> None:
        widths, weight_format, self.options = CASES[name]
        self.checkpoint, self.speech = speech / "hybrid", speech
        self.allocations = [
            write_allocation(folder / f"b{bits}.json", self.checkpoint, bits, weight_format) for bits in widths
        ]
        self.whole = folder / "whole"
        self.run(self.whole)

    def recipe(self, **more: Any) -> Recipe:
        return with_data(self.speech, **(self.options | more))

    def run(self, out: Path, **more: Any) -> FinetuneResult:
        return tune(self.checkpoint, self.allocations, self.recipe(**more), out)


@pytest.fixture(scope="module")
def cases(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All of them."""
    return {name: Case(name, speech, tmp_path_factory.mktemp(name)) for name in CASES}


POINTS = {
    "while the start is evaluated": (finetune_loop, "changed_errors", 1, False),
    "between the start's log and its candidate": (Finetuner, "write_candidate", 1, False),
    "inside an update": (Finetuner, "losses", 4, True),
    "while an epoch is evaluated": (finetune_loop, "changed_errors", 6, False),
    "between an epoch's log and its candidate": (Finetuner, "write_candidate", 3, False),
    "between a candidate and the state": (Finetuner, "write_candidate", 3, True),
    "after the state of an epoch": (TrainingLoop, "_save", 6, True),
    "before the artifacts": (finetune_loop, "write_artifact", 1, False),
    "between two artifacts": (finetune_loop, "write_artifact", 2, False),
    "while the artifact is evaluated": (finetune_loop, "read_artifact", 2, True),
    "before the float checkpoint": (finetune_loop, "write_checkpoint", 1, False),
    "between artifact and result": (finetune_loop, "write_json", 2, False),
    "after the result": (finetune_loop, "clean_up", 1, False),
}


@pytest.mark.parametrize(
    "point",
    some_always(POINTS, ("inside an update", "between a candidate and the state", "between artifact and result")),
)
def test_a_killed_fine_tuning_ends_as_if_it_had_not_been(
    point: str, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, out = cases["all"], tmp_path / "out"
    with monkeypatch.context() as patch:
        fails_at(*POINTS[point][:3], patch, POINTS[point][3])
        with pytest.raises(CrashError):
            case.run(out, save_minutes=1e-9)
    case.run(out, save_minutes=1e-9)
    assert_same_training(out, case.whole)


@pytest.mark.parametrize("name", some_always(["mulaw", "learned", "frozen"], ["learned"]))
def test_a_killed_fine_tuning_of_another_kind(
    name: str, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: after an update that was saved, and between a candidate and the state that was saved long before."""
    case, out = cases[name], tmp_path / "out"
    for method, call, minutes in (("losses", 2, 1e-9), ("_write_candidate", 1, 10.0)):
        with monkeypatch.context() as patch:
            fails_at(Finetuner, method, call, patch, after=True)
            with pytest.raises(CrashError):
                case.run(out, save_minutes=minutes)
    case.run(out)
    assert_same_training(out, case.whole)


@pytest.mark.parametrize(
    ("name", "number"),
    some_always([*((name, signal.SIGTERM) for name in CASES), ("frozen", signal.SIGINT)], [("frozen", signal.SIGINT)]),
)
def test_a_stopped_fine_tuning_goes_on(
    name: str, number: int, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update under way is finished and saved, and nothing of it is done again."""
    case, out = cases[name], tmp_path / "out"
    prepare, done = Finetuner.prepare_update, []

    def asked(tuner: Finetuner) -> None:
        done.append(tuner.step)
        if tuner.step in (1, 2):
            signal.raise_signal(number)
        prepare(tuner)

    monkeypatch.setattr(Finetuner, "prepare_update", asked)
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            case.run(out)
        assert torch.load(out / "state.pt", weights_only=True)["step"] == step
        assert not (out / "finetune.json").exists()
    case.run(out)
    assert done == sorted(set(done))
    assert_same_training(out, case.whole)


def test_the_interruptions_are_where_they_should_be(cases: dict[str, Case]) -> None:
    """Two epochs of two updates or more, and training that has moved the weights."""
    for case in cases.values():
        result = FinetuneResult.load(case.whole / "finetune.json")
        assert result.epochs[1].step >= 2 and len(result.epochs) == 3
        for size in result.sizes:
            assert size.dev[1][0] != size.dev[0][0] != size.dev[2][0]


def test_a_finished_folder_is_left_as_it_is(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["frozen"]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in case.whole.iterdir()}
    assert set(before) >= {"packed.safetensors", "float.safetensors", "recipe.json", "log.jsonl", "finetune.json"}
    assert not set(before) & {"state.pt", "started.json", "epochs"}
    result = case.run(case.whole)
    assert result == FinetuneResult.load(case.whole / "finetune.json")
    case.run(case.whole, save_minutes=1.0, workers=1, tensorboard=True)  # which change no weight
    with pytest.raises(MpqError, match="holds a finished training with other options or data"):
        case.run(case.whole, learning_rate=0.2)
    with pytest.raises(MpqError, match="holds a finished training with other options or data"):
        case.run(case.whole, seed=4)
    with pytest.raises(MpqError, match="holds a finished training with other options or data"):
        case.run(case.whole, finetune_augment={"speed": [1.1]})
    speech, others = case.speech, write_allocation(tmp_path / "b2.json", case.checkpoint, 3)
    for train, dev, allocations in (
        (speech / "dev.jsonl", speech / "dev.jsonl", case.allocations),
        (speech / "train.jsonl", speech / "train.jsonl", case.allocations),
        (speech / "train.jsonl", speech / "dev.jsonl", [others]),
    ):
        with pytest.raises(MpqError, match="holds a finished training with other options or data"):
            tune(case.checkpoint, allocations, tuning_recipe(train, dev, **case.options), case.whole)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in case.whole.iterdir()}
    lost = case.whole / "packed.safetensors"
    lost.unlink()  # then it is made again
    case.run(case.whole)
    assert lost.read_bytes() == before["packed.safetensors"][0]


@pytest.mark.parametrize(
    "name", ["packed.safetensors", "float.safetensors", "model.safetensors", "log.jsonl", "state.pt"]
)
def test_files_of_somebody_else_are_left_alone(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(MpqError, match=f"{name}: is in the way, and no training wrote it; choose another --out"):
        cases["frozen"].run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"somebody's"}


def test_an_unfinished_folder_of_another_training_is_refused(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases["frozen"]
    with monkeypatch.context() as patch:
        fails_at(*POINTS["inside an update"][:2], 1, patch, True)
        with pytest.raises(CrashError):
            case.run(tmp_path)
    with pytest.raises(MpqError, match="holds an unfinished training with other options or data"):
        case.run(tmp_path, bound=0.0)
