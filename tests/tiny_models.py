"""Tiny models with random weights, in the shape of every family that mpq reads."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tiny_training import RATE, TEXTS
from torch import Tensor

from mpq.config import AugmentConfig, FeaturesConfig, ModelConfig, Recipe, TokensConfig
from mpq.models.attention_decoder import DecoderOptions
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerOptions
from mpq.models.hybrid import HybridConformer
from mpq.models.nemo import NemoConformerCtc
from mpq.speech.features import LogMelOptions
from mpq.speech.text import CharTokenizer, train_tokenizer
from mpq.training.building import build_model

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz'"]


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


def tiny_hybrid(kind: str = "characters", seed: int = 0, **options: Any) -> HybridConformer:
    """Returns a model with random weights and running statistics."""
    shape = {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "ffn_width": [24, 16],
        "ffn_rank": [0, 4],
        "kernel_size": 5,
        "subsampling_channels": 4,
        "decoder_layers": 1,
        "decoder_heads": 2,
        "decoder_ffn_width": 16,
    }
    recipe = Recipe(
        features=FeaturesConfig(sample_rate=RATE, n_mels=20, pitch=True),
        tokens=TokensConfig(type=kind, vocabulary_size=9 if kind == "bpe" else None),
        model=ModelConfig(**(shape | options)),
        augment=AugmentConfig(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(recipe, train_tokenizer(kind, TEXTS, recipe.tokens.vocabulary_size))
        for name, tensor in model.state_dict().items():
            if "running" in name:
                tensor.uniform_(0.5, 1.5)
    return model


def large(family: str) -> AsrModel:
    """Returns a model of 2 blocks, some of its modules factored, with random weights."""
    if family == "nemo":
        return tiny_model(ffn_width=[32, 20], ffn_rank=[8, 5], ffn2_width=[24, 32], ffn2_rank=[0, 8])
    return tiny_hybrid(ffn_width=[32, 20], ffn_rank=[8, 5], ffn2_width=[24, 32], ffn2_rank=[0, 8])


def log_probs(model: AsrModel) -> Tensor:
    """Returns the CTC output for two waveforms."""
    waveforms = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoded, _ = model.encode(*model.features(waveforms, torch.tensor([9000, 6000])))
        return model.ctc_log_probs(encoded)


def three_features(model: AsrModel) -> list[tuple[Tensor, Tensor]]:
    """Returns the features of three waveforms, each on its own."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (9000, 7000, 12000):
        features, lengths = model.features(0.1 * torch.randn(1, size, generator=generator), torch.tensor([size]))
        found.append((features[:, : int(lengths)], lengths))
    return found


def small_model(has_decoder: bool = True, conv_norm: str = "batch_norm") -> HybridConformer:
    """Returns a model of three letters with random weights."""
    options = ConformerOptions(
        features=8,
        layers=2,
        width=16,
        heads=2,
        ffn_width=32,
        kernel_size=5,
        subsampling="striding",
        subsampling_factor=4,
        subsampling_channels=4,
        conv_norm=conv_norm,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = HybridConformer(
            options,
            DecoderOptions(2, 2, 32) if has_decoder else None,
            LogMelOptions(8000, 8, 256, 200, 80, fmax=4000.0),
            CharTokenizer("abc"),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_features(*lengths: int, padding: int = 0, seed: int = 0, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns (N, T, 8) features, each utterance's the same whatever the others are, and (N,) lengths."""
    features = torch.full((len(lengths), max(lengths) + padding, 8), fill)
    for row, length in enumerate(lengths):
        numbers = np.random.default_rng([seed, length]).normal(size=(length, 8))
        features[row, :length] = torch.from_numpy(numbers).float()
    return features, torch.tensor(lengths)
