"""The state of an unfinished training: a kill leaves the one before, and a spoilt one is refused."""

from pathlib import Path
from typing import IO, Any

import pytest
import torch
from tiny_training import CrashError, assert_same, dropping, fails_at, speech, whole, with_options

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.training import objectives
from mpq.training.run import train
from mpq.training.state import candidate_path, read_state, remove_candidates, write_state

__all__ = ["dropping", "speech", "whole"]  # fixtures


def test_a_state_that_was_cut_off_leaves_the_one_before(
    dropping: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, saved = tmp_path / "out", torch.save, []

    def cut(state: dict[str, Any], file: IO[bytes]) -> None:
        save(state, file)
        saved.append(state["step"])
        if len(saved) == 6:
            file.truncate(1000)
            raise CrashError

    changed = with_options(dropping, save_minutes=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(CrashError):
            train(changed, out, quiet=True)
    assert torch.load(out / "state.pt", weights_only=True)["step"] == saved[-2]
    train(changed, out, quiet=True)
    assert_same(out, whole)


def test_a_spoilt_state_is_refused(dropping: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(objectives, "held_out_errors", 2, monkeypatch)
    with pytest.raises(CrashError):
        train(dropping, tmp_path, quiet=True)
    state = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(MpqError, match=r"state\.pt: cannot be read .*; delete the folder to begin anew"):
        train(dropping, tmp_path, quiet=True)


def test_an_epoch_under_way_belongs_to_as_many_processes(tmp_path: Path) -> None:
    assert read_state(tmp_path, torch.device("cpu"), 1) is None
    write_state(tmp_path, {"batch": 3, "processes": 2, "step": 7})
    assert read_state(tmp_path, torch.device("cpu"), 2) == {"batch": 3, "processes": 2, "step": 7}
    with pytest.raises(MpqError, match="that 2 processes share; go on with as many, not with 1, until its end"):
        read_state(tmp_path, torch.device("cpu"), 1)
    write_state(tmp_path, {"batch": 0, "processes": 2, "step": 9})
    assert read_state(tmp_path, torch.device("cpu"), 1) is not None


def test_candidates_but_some_are_removed(tmp_path: Path) -> None:
    for epoch in (1, 2, 12):
        candidate_path(tmp_path, epoch).parent.mkdir(exist_ok=True)
        candidate_path(tmp_path, epoch).write_bytes(b"")
    remove_candidates(tmp_path, but=[2, 3])
    assert list((tmp_path / "epochs").iterdir()) == [candidate_path(tmp_path, 2)]
