"""A checkpoint folder is never taken for another's, never lost to a kill, and not overwritten."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from tiny_training import TEXTS, log_of, recipe, write_speech

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.runtime import memory_for
from mpq.training import objectives
from mpq.training import weights as weight_loop
from mpq.training.log import TrainingLog
from mpq.training.run import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder, TEXTS[:4])
    write_speech(folder, TEXTS[4:6], "dev.jsonl")
    return recipe(folder, train__average=1, train__epochs=3)


@pytest.mark.parametrize("name", ["model.safetensors", "log.jsonl", "state.pt", "recipe.json"])
def test_files_of_somebody_else_are_left_alone(tiny: Recipe, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(MpqError, match=f"{name}: is in the way, and not of a training; choose another --out"):
        train(tiny, tmp_path, quiet=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"somebody's"}


def test_a_model_that_was_deleted_is_trained_again(tiny: Recipe, tmp_path: Path) -> None:
    train(tiny, tmp_path / "out", quiet=True)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "out/model.safetensors").unlink()
    train(tiny, tmp_path / "out", quiet=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_no_candidate_is_removed_before_the_state_knows_why(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after an epoch that displaces the best one, and that scores worse when it is done again (as on a GPU)."""
    scores = [(1.0, 0.5), (1.0, 0.4), (1.0, 0.9), (1.0, 0.9), (1.0, 0.9)]  # second epoch: first the best, then not
    monkeypatch.setattr(objectives, "held_out_errors", lambda *_: scores.pop(0))
    saves, save = [], weight_loop.WeightTrainer._save

    def killed(self: Any) -> None:
        saves.append(self.epoch)
        if self.epoch == 2 and saves.count(2) == 1:
            raise MemoryError("killed")
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(weight_loop.WeightTrainer, "_save", killed)
        with pytest.raises(MemoryError):
            train(tiny, tmp_path / "out", quiet=True)
    assert (tmp_path / "out/epochs/0001.safetensors").exists()
    assert train(tiny, tmp_path / "out", quiet=True).averaged == (1,)


def test_a_log_that_is_shorter_than_the_state_says_gets_no_zeros(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    log = TrainingLog(tmp_path, 1, is_writing=True, quiet=True, tensorboard=False)
    with log.opened(size=500, step=40):
        log.add_update(41, 1, {"loss": 1.0})
    assert [line.get("step") for line in log_of(tmp_path)] == [1, 41]


def test_an_option_that_is_new_and_not_used_leaves_the_fingerprint(tiny: Recipe, tmp_path: Path) -> None:
    """That of a training from before `augment.level_db`, written down again: it goes on."""
    result = train(tiny, tmp_path / "out", quiet=True)
    sections = json.loads((tmp_path / "out/recipe.json").read_text())
    del sections["augment"]["level_db"]
    for name in ("save_minutes", "workers", "tensorboard"):
        del sections["train"][name]
    options = {name: sections[name] for name in ("features", "tokens", "model", "augment", "train")}
    folder = Path(tiny.data.root)
    identity = [
        [f"{name}-{index}", text, None, soundfile.info(path).duration, path.stat().st_size]
        for name, texts in (("train", TEXTS[:4]), ("dev", TEXTS[4:6]))
        for index, text in enumerate(texts)
        for path in [folder / f"{name}-{index}.wav"]
    ]
    work = ["mpq.training/1", 0, "error", options, identity]
    assert result.fingerprint == hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
    louder = tiny.model_copy(update={"augment": tiny.augment.model_copy(update={"level_db": (-1.0, 0.0)})})
    with pytest.raises(MpqError, match="holds a finished training with other options or data"):
        train(louder, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: an illegal memory access was encountered", False),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
    ],
)
def test_only_want_of_memory_is_called_that(message: str, is_memory: bool) -> None:
    with pytest.raises(MpqError if is_memory else RuntimeError), memory_for("a batch"):
        raise RuntimeError(message)


def test_pitch_is_masked_with_whole_frames_alone(tmp_path: Path) -> None:
    write_speech(tmp_path, TEXTS[:2])
    changes = {"features__pitch": True, "data__dev": None, "train__select": "last", "augment__time_mask_fraction": 0.5}
    with_pitch = recipe(tmp_path, **changes, augment__frequency_masks=2, augment__frequency_mask_width=20)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = weight_loop.WeightTrainer._masked

    def watched(self: Any, features: Any, frames: Any, items: Any) -> Any:
        found = plain(self, features, frames, items)
        seen.append((features, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_loop.WeightTrainer, "_masked", watched)
        train(with_pitch, tmp_path / "out", quiet=True)
    banded = whole = 0
    for before, after in seen:
        masked = (before != 0) & (after == 0)
        bands, pitch = masked[..., :20], masked[..., 20:]
        is_whole = bands.sum(-1) == (before[..., :20] != 0).sum(-1)
        assert not pitch[~is_whole].any()
        banded += int((bands.any(-1) & ~is_whole).sum())
        whole += int((pitch.any(-1) & is_whole).sum())
    assert banded > 0 and whole > 0


@pytest.mark.parametrize("is_asked", [False, True])
def test_freed_memory_is_kept(is_asked: bool) -> None:
    """In a process of its own: 256 MB that were freed are still the process's."""
    code = (
        "import os, platform, torch\nfrom mpq.runtime import keep_freed_memory\n"
        f"is_kept = {is_asked} and keep_freed_memory()\n"
        f"assert is_kept == ({is_asked} and platform.libc_ver()[0] == 'glibc')\n"
        "def held():\n    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "before = held()\nlarge = torch.ones(2**26)\nassert held() - before > 2**27\ndel large\n"
        "assert (held() - before > 2**27) == is_kept, held() - before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
