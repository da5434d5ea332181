"""What several test modules use: the shared folder, and a tiny model with data that any clone can make."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import soundfile
import torch
import yaml

from mpq.features import LogMelOptions
from mpq.models.conformer import ConformerOptions
from mpq.models.nemo import NemoConformerCtc
from mpq.text import CharTokenizer

hypothesis.settings.register_profile("mpq", deadline=None)  # machines are shared, and slow at times
hypothesis.settings.load_profile("mpq")

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz'"]


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


def nemo_config(**changes: dict) -> dict:
    """Returns the configuration of the tiny model; `changes` are merged into its sections."""
    config = {
        "target": "nemo.collections.asr.models.ctc_models.EncDecCTCModel",
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "features": 64,
            "n_fft": 512,
            "pad_to": 0,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": 64,
            "n_layers": 2,
            "d_model": 16,
            "subsampling": "dw_striding",
            "subsampling_factor": 4,
            "subsampling_conv_channels": 6,
            "ff_expansion_factor": 2,
            "n_heads": 2,
            "conv_kernel_size": 5,
        },
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
            "feat_in": 16,
            "num_classes": len(LABELS),
            "vocabulary": LABELS,
        },
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values} if isinstance(values, dict) else values
    return config


def tiny_model(**encoder: object) -> NemoConformerCtc:
    """Returns a model with random weights whose outputs are far from uniform; options change its encoder."""
    options = {
        "features": 64,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "ffn_width": 32,
        "kernel_size": 5,
        "subsampling": "dw_striding",
        "subsampling_factor": 4,
        "subsampling_channels": 6,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = NemoConformerCtc(
            ConformerOptions(**(options | encoder)),
            LogMelOptions(16000, 64, 512, 400, 160),
            CharTokenizer(LABELS),
        )
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("running_var", "norm_out.weight")):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point() and "preprocessor" not in name:
                    tensor.add_(0.3 * torch.randn_like(tensor))
    return model


def write_nemo(path: Path, config: dict, state: dict, members: dict[str, bytes] | None = None) -> Path:
    """Writes a `.nemo` archive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = {"./model_config.yaml": yaml.safe_dump(config).encode(), "./model_weights.ckpt": buffer.getvalue()}
    with tarfile.open(path, "w") as archive:
        for name, content in (contents | (members or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def tiny_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a `.nemo` archive."""
    return write_nemo(tmp_path_factory.mktemp("model") / "tiny.nemo", nemo_config(), tiny_model().state_dict())


@pytest.fixture(scope="session")
def deeper_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8 blocks: enough layers to be interrupted between."""
    path = tmp_path_factory.mktemp("deeper") / "deeper.nemo"
    return write_nemo(path, nemo_config(encoder={"n_layers": 8}), tiny_model(layers=8).state_dict())


def noisy_tone(random: np.random.Generator, seconds: float, hertz: float, sweep: float) -> np.ndarray:
    """Returns samples at 16 kHz of a rising tone in noise."""
    time = np.arange(int(16000 * seconds)) / 16000
    return 0.3 * np.sin(2 * np.pi * hertz * time * (1 + sweep * time)) + 0.05 * random.normal(size=time.size)


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


def drawn_parts(manifest: Path, *most_seconds: float, seed: int = 0) -> list[list[Path]]:
    """Returns random parts of a manifest's files, each from what those before it left: the rule written down again."""
    files = [manifest.parent / json.loads(line)["audio_filepath"] for line in manifest.read_text().splitlines()]
    files.sort(key=lambda file: hashlib.sha256(f"{seed}:{file.stem}".encode()).digest())
    parts = []
    for most in most_seconds:
        part: list[Path] = []
        for file in files:
            if not part or audio_seconds([*part, file]) <= most:
                part.append(file)
        files = [file for file in files if file not in part]
        parts.append(sorted(part))
    return parts


def audio_seconds(files: list[Path]) -> float:
    return sum(soundfile.info(file).frames for file in files) / 16000


def plain_divergence(
    model: NemoConformerCtc, changed: NemoConformerCtc, files: list[Path], output: str = "ctc"
) -> torch.Tensor:
    """Returns (files, 2): the sum over frames of KL(model || changed), at most 1 each, and the number of frames.

    Whole forward passes, each file on its own; distributions in double precision.
    """
    found = []
    with torch.inference_mode():
        for file in files:
            samples, rate = soundfile.read(file, dtype="float32")
            assert rate == model.sample_rate
            features, lengths = model.features(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
            rows = []
            for one in (model, changed):
                encoded, _ = one.encode(features[:, : int(lengths)], lengths)
                logits = encoded if output == "encoder" else one.ctc_log_probs(encoded)
                rows.append(logits[0].double().softmax(dim=-1))
            p, q = rows
            found.append([sum(min(float(kl), 1.0) for kl in (p * (p / q).log()).sum(dim=-1)), len(p)])
    return torch.tensor(found, dtype=torch.float64)
