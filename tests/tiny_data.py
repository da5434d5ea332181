"""Tiny audio, and what it does to a model, worked out by plain loops."""

import hashlib
import json
from pathlib import Path

import numpy as np
import soundfile
import torch

from mpq.models.base import AsrModel


def noisy_tone(random: np.random.Generator, seconds: float, hertz: float, sweep: float) -> np.ndarray:
    """Returns samples at 16 kHz of a rising tone in noise."""
    time = np.arange(int(16000 * seconds)) / 16000
    return 0.3 * np.sin(2 * np.pi * hertz * time * (1 + sweep * time)) + 0.05 * random.normal(size=time.size)


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


def plain_divergence(model: AsrModel, changed: AsrModel, files: list[Path], output: str = "ctc") -> torch.Tensor:
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
