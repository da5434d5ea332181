"""What model_config.yaml may say, and how it is refused."""

from pathlib import Path

import pytest
import torch
from tiny_models import nemo_config, tiny_model, write_nemo

from mpq.errors import MpqError
from mpq.loading import load_model

STATE = tiny_model().state_dict()


def test_null_is_absent_and_defaults_may_be_written_out(tmp_path: Path) -> None:
    encoder = {"causal_downsampling": None, "att_context_style": None, "conv_norm_type": None, "use_bias": None}
    config = nemo_config(encoder=encoder | {"conv_context_size": [2, 2]}, decoder={"num_classes": None})
    assert load_model(write_nemo(tmp_path / "m.nemo", config, STATE)).encoder.options == tiny_model().encoder.options


def without(name: str) -> dict:
    return {key: tensor for key, tensor in STATE.items() if key != name}


WEIGHT = "encoder.layers.1.self_attn.linear_q.weight"


@pytest.mark.parametrize(
    "config, state, words",
    [
        (nemo_config(), without(WEIGHT), f"tensor {WEIGHT} is missing"),
        (nemo_config(), STATE | {"encoder.more": torch.zeros(2)}, r"tensor encoder\.more .*has no place"),
        (nemo_config(), STATE | {WEIGHT: torch.zeros(16, 15)}, rf"{WEIGHT}: expected shape \(16, 16\), got \(16, 15\)"),
        (nemo_config(), STATE | {WEIGHT: torch.full((16, 16), torch.nan)}, f"{WEIGHT} has values that are not finite"),
        (nemo_config(target="nemo.collections.asr.models.rnnt_models.EncDecRNNTModel"), STATE, "RNN-T.*supported: CTC"),
        (nemo_config(target="a.EncDecHybridRNNTCTCModel"), STATE, "RNN-T.*supported: CTC"),
        (nemo_config(target="a.EncDecSpeakerLabelModel"), STATE, "unknown architecture.*supported"),
        (nemo_config(encoder={"_target_": "a.SqueezeformerEncoder"}), STATE, "unknown architecture"),
        (nemo_config(encoder={"self_attention_model": "rel_pos_local_attn"}), STATE, "encoder.self_attention_model"),
        (nemo_config(encoder={"subsampling": "vggnet"}), STATE, "encoder.subsampling"),
        (nemo_config(encoder={"att_context_size": [64, 0]}), STATE, "encoder.att_context_size"),
        (nemo_config(encoder={"conv_kernel_size": 4}), STATE, "kernel_size: expected an odd number"),
        (nemo_config(encoder={"subsampling_factor": 3}), STATE, "power of two"),
        (nemo_config(encoder={"n_heads": 3}), STATE, "multiple of heads"),
        (nemo_config(encoder={"n_layers": "two"}), STATE, "encoder.n_layers: expected a whole number"),
        (nemo_config(encoder={"feat_in": 80}), STATE, "feat_in is 80"),
        (nemo_config(encoder=None), STATE, "encoder"),
        (nemo_config(preprocessor={"normalize": "fixed_mean"}), STATE, "preprocessor.normalize"),
        (nemo_config(preprocessor={"frame_splicing": 3}), STATE, "preprocessor.frame_splicing"),
        (nemo_config(decoder={"num_classes": 5}), STATE, "num_classes is 5"),
        (nemo_config(encoder={"n_layers": 2.5}), STATE, "encoder.n_layers: expected a whole number"),
        (nemo_config(encoder={"n_heads": 0}), STATE, "encoder.n_heads: expected a whole number, 1 or more, got 0"),
        (nemo_config(encoder={"d_model": float("nan")}), STATE, "encoder.d_model"),
        (nemo_config(encoder={"d_model": 10**8}), STATE, "memory|overflow|invalid|expected shape"),
        (nemo_config(encoder={"conv_kernel_size": -5}), STATE, "encoder.conv_kernel_size"),
        (nemo_config(encoder={"subsampling_conv_channels": 0}), STATE, "encoder.subsampling_conv_channels"),
        (nemo_config(encoder={"ff_expansion_factor": -1}), STATE, "encoder.ff_expansion_factor"),
        (nemo_config(encoder={"use_bias": "false"}), STATE, "encoder.use_bias: expected true or false, got 'false'"),
        (nemo_config(preprocessor={"n_fft": "abc"}), STATE, "preprocessor.n_fft"),
        (nemo_config(preprocessor={"n_fft": 100}), STATE, "preprocessor.n_fft: expected a whole number, 400 or more"),
        (nemo_config(preprocessor={"window_stride": 0}), STATE, "preprocessor.n_window_stride"),
        (nemo_config(preprocessor={"lowfreq": 900, "highfreq": 800}), STATE, "lowfreq < highfreq"),
        (nemo_config(decoder=[1]), STATE, "decoder: expected a mapping"),
        (nemo_config(), STATE | {WEIGHT: STATE[WEIGHT].to(torch.complex64)}, f"{WEIGHT}: expected plain real numbers"),
        (nemo_config(), STATE | {WEIGHT: STATE[WEIGHT] > 0}, f"{WEIGHT}: expected torch.float32, got torch.bool"),
        (
            nemo_config() | {"tokenizer": {"type": "wpe"}},
            STATE,
            "bpe",
        ),
        (
            nemo_config() | {"tokenizer": {"type": "bpe", "model_path": "nemo:../../etc/passwd"}},
            STATE,
            "leaves the archive",
        ),
        (nemo_config() | {"tokenizer": {"type": "bpe", "model_path": "/etc/passwd"}}, STATE, "leaves the archive"),
        (
            nemo_config() | {"tokenizer": {"type": "bpe", "model_path": "nemo:x.model"}},
            STATE,
            "'x.model': no such member",
        ),
    ],
)
def test_archives_that_cannot_be_read_are_refused_by_name(tmp_path: Path, config, state, words) -> None:
    path = write_nemo(tmp_path / "bad.nemo", config, state)
    with pytest.raises(MpqError, match=words) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, text",
    [
        (
            nemo_config(encoder={"subsampling": "vggnet"}),
            "encoder.subsampling: expected 'striding' or 'dw_striding', got 'vggnet'",
        ),
        (
            nemo_config(encoder={"att_context_size": [64, 0]}),
            "encoder.att_context_size: expected [-1, -1] or [[-1, -1]], got [64, 0]",
        ),
        (nemo_config(encoder={"conv_context_size": [4, 0]}), "encoder.conv_context_size: expected [2, 2], got [4, 0]"),
        (nemo_config(preprocessor={"mag_power": 1.0}), "preprocessor.mag_power: expected 2, got 1.0"),
        (
            nemo_config(preprocessor={"features": True}),
            "preprocessor.features: expected a whole number, 1 or more, got True",
        ),
        (
            nemo_config(preprocessor={"window_stride": 0}),
            "preprocessor.n_window_stride: expected a whole number, 1 or more, got 0",
        ),
        (nemo_config(decoder={"vocabulary": ["a", 1]}), "decoder.vocabulary.1: expected a string, got 1"),
        (nemo_config(preprocessor=3), "preprocessor: expected a mapping, got 3"),
        (nemo_config() | {"tokenizer": {"type": "wpe"}}, "tokenizer.type: expected 'bpe', got 'wpe'"),
    ],
)
def test_messages_name_file_key_expected_and_got(tmp_path: Path, config: dict, text: str) -> None:
    path = write_nemo(tmp_path / "m.nemo", config, STATE)
    with pytest.raises(MpqError) as caught:
        load_model(path)
    assert str(caught.value) == f"{path}: model_config.yaml: {text}"


def test_options_of_the_features(tmp_path: Path) -> None:
    """Numbers that are written as 64.0, null that means none, and the defaults of the framework."""
    config = nemo_config(preprocessor={"features": 64.0, "preemph": None, "normalize": None, "n_fft": None})
    mel = load_model(write_nemo(tmp_path / "m.nemo", config, STATE)).mel
    assert (mel.n_mels, mel.preemphasis, mel.normalize, mel.n_fft, mel.fmax) == (64, 0.0, "none", 512, 8000.0)
    absent = {key: one for key, one in config["preprocessor"].items() if key not in ("preemph", "normalize", "n_fft")}
    mel = load_model(write_nemo(tmp_path / "m.nemo", config | {"preprocessor": absent}, STATE)).mel
    assert (mel.preemphasis, mel.normalize, mel.log_guard) == (0.97, "per_feature", 2.0**-24)
