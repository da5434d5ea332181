"""What several test modules use: the shared folder, and a tiny model with data that any clone can make."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import soundfile
import torch
from tiny_data import noisy_tone
from tiny_models import nemo_config, tiny_model, write_nemo

torch.set_num_threads(1)  # sums of several threads differ in a bit, and there may be a process of tests for each core
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start, too
hypothesis.settings.register_profile("mpq", deadline=None)  # machines are shared, and slow at times
hypothesis.settings.load_profile("mpq")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder (papers, reference cases, real speech), or the test is skipped."""
    folder = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"not run: needs the shared data folder, which is not at {folder} (set MPQ_SHARED)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Statistics are cached in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MPQ_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a `.nemo` archive."""
    return write_nemo(tmp_path_factory.mktemp("model") / "tiny.nemo", nemo_config(), tiny_model().state_dict())


@pytest.fixture(scope="session")
def deeper_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8 blocks: enough layers to be interrupted between."""
    path = tmp_path_factory.mktemp("deeper") / "deeper.nemo"
    return write_nemo(path, nemo_config(encoder={"n_layers": 8}), tiny_model(layers=8).state_dict())


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of six noisy tones of 0.3 to 1.3 s, with transcripts that have nothing to do with them."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(3)
    lines = []
    for index in range(6):
        seconds = 0.3 + 0.2 * index
        soundfile.write(folder / f"utt{index}.wav", noisy_tone(random, seconds, 200 + 150 * index, 0.3), 16000)
        lines.append({"audio_filepath": f"utt{index}.wav", "text": "a few words", "duration": round(seconds, 3)})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def many_tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 20 noisy tones, t00 to t19, of 0.3 to 0.68 s: enough for several parts."""
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(5)
    lines = []
    for index in range(20):
        wave = noisy_tone(random, 0.3 + 0.02 * index, 150 + 90 * index, 0.5)
        soundfile.write(folder / f"t{index:02}.wav", wave, 16000)
        lines.append(json.dumps({"audio_filepath": f"t{index:02}.wav"}) + "\n")
    path = folder / "tones.jsonl"
    path.write_text("".join(lines))
    return path
