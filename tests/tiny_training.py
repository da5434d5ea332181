"""Speech that a tiny model learns in seconds: every letter is a tone; and recipes for it."""

import json
import os
import signal
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mpq.config import Recipe
from mpq.pipeline.read import load_recipe
from mpq.training.run import train

RATE = 8000
HERTZ = {"a": 400, "b": 800, "c": 1400, "d": 2200, "e": 3200}
TEXTS = ("abc", "cab", "bad", "deed", "ace", "ebb", "dad", "bed cab", "a dab", "cede")


def spoken(text: str, seconds: float = 0.16) -> np.ndarray:
    """Returns (S,) samples: a tone of so many seconds a letter with a short pause after it; a space is silence."""
    time = np.arange(int(RATE * seconds)) / RATE
    tone = {letter: 0.3 * np.sin(2 * np.pi * hertz * time) for letter, hertz in HERTZ.items()}
    parts = [np.concatenate((tone.get(letter, 0 * time), np.zeros(RATE // 25))) for letter in text]
    noise = np.random.default_rng(len(text)).normal(size=sum(map(len, parts)))
    return np.concatenate(parts) + 0.003 * noise


def write_speech(folder: Path, texts: Sequence[str] = TEXTS, name: str = "train.jsonl", seconds: float = 0.16) -> Path:
    """Writes a manifest of an utterance for each text, named NAME-0, NAME-1, ..., and their audio."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, text in enumerate(texts):
        utt_id = f"{Path(name).stem}-{index}"
        soundfile.write(folder / f"{utt_id}.wav", spoken(text, seconds), RATE)
        lines.append(json.dumps({"audio_filepath": f"{utt_id}.wav", "text": text}) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"train": ["train.jsonl"], "dev": "dev.jsonl"},
    "features": {"sample_rate": RATE, "n_mels": 20},
    "model": {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "ffn_width": 32,
        "kernel_size": 5,
        "subsampling": "dw_striding",
        "subsampling_channels": 4,
        "dropout": 0.0,
        "decoder_layers": 1,
        "decoder_heads": 2,
        "decoder_ffn_width": 32,
    },
    "train": {
        "epochs": 3,
        "batch_frames": 400,
        "learning_rate": 0.003,
        "warmup_steps": 4,
        "workers": 0,
        "average": 2,
    },
    "augment": {
        "speed": [0.9, 1.0, 1.1],
        "noise": ["white", "babble"],
        "frequency_masks": 1,
        "frequency_mask_width": 4,
        "time_masks": 1,
        "time_mask_width": 8,
    },
}


def write_recipe(path: Path, **changes: Any) -> Path:
    """Writes the recipe; `changes` are "section__key": value (None takes a key out)."""
    sections = {name: dict(section) for name, section in SECTIONS.items()}
    for name, value in changes.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    lines = []
    for name, section in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in section.items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Returns the recipe for a folder that has the data."""
    return load_recipe(write_recipe(folder / "recipe.toml", **changes), stages=["train"])


def log_of(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of a training's log, times aside."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def train_as_process(rank: int, port: int, path: Path, out: Path, stop_at: int | None) -> None:
    """Trains as one of the two processes that torchrun would start, and exits as the command line does.

    Args:
        rank: 0 or 1.
        port: Where a TCPStore listens.
        path: The recipe.
        out: The checkpoint folder.
        stop_at: This process is asked to stop (SIGTERM) before the update after so many.
    """
    from mpq.cli.main import main
    from mpq.training import weights as weight_loop

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    update = weight_loop.WeightTrainer._update

    def stopping(self: Any, *arguments: Any) -> Any:
        if self.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *arguments)

    weight_loop.WeightTrainer._update = stopping
    main(["train", str(path), "--out", str(out), "--quiet"])


class CrashError(Exception):
    """What the tests raise in the middle of things."""


def some_always(names: Iterable[Any], always: Container[Any]) -> list[Any]:
    """Returns the parameters of a test: those in `always`, and the others for the run of the slow tests alone."""
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=() if one in always else pytest.mark.slow)
        for one in names
    ]


def fails_at(owner: Any, name: str, call: int, patch: pytest.MonkeyPatch, after: bool = False) -> None:
    """Lets a function fail at its n-th call, before or after it has done its work."""
    function, calls = getattr(owner, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise CrashError
        result = function(*arguments, **options)
        if calls == call:
            raise CrashError
        return result

    patch.setattr(owner, name, failing)


PLAIN = {
    "augment__speed": [1.0],
    "augment__noise": [],
    "augment__frequency_masks": 0,
    "augment__time_masks": 0,
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten utterances to train on and three held out."""
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder)
    write_speech(folder, ["abed", "dace", "a bee"], "dev.jsonl")
    return folder


@pytest.fixture(scope="module")
def dropping(speech: Path) -> Recipe:
    """A recipe with all that is drawn at random."""
    return recipe(speech, model__dropout=0.1)


@pytest.fixture(scope="module")
def whole(dropping: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of that recipe, trained without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(dropping, out, quiet=True)
    return out


def updates(out: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(out) if "rate" in line]


def with_options(recipe: Recipe, **options: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=options)})


def assert_same(out: Path, other: Path) -> None:
    """The same log but for the times, and the same model to the last bit."""
    assert log_of(out) == log_of(other)
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


WITHOUT_GRADIENT = ("linear_k.bias", "linear_pos.weight", "depthwise_conv.bias", "batch_norm.running_mean")
"""The softmax and the batch normalisation take out what is the same everywhere: these biases, and the slowest sinusoids
of the positions. Their gradient is rounding noise, which Adam scales up; the running mean has such a bias in it."""
