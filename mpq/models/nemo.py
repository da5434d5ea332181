"""NeMo's Conformer-CTC and FastConformer-CTC archives, read without NeMo.

A `.nemo` file is a tar (old ones gzipped) of `model_config.yaml`, `model_weights.ckpt` and the tokenizer's files. The
archive is read in memory: nothing is extracted, nothing is unpickled but tensors, and no name may lead out of it.

Checked against NeMo 3.0.0. Legend: N utterances, T' encoder frames, D encoder width, V tokens with blank.
"""

import io
import math
import pickle
import posixpath
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.features import LogMel, LogMelOptions
from mpq.models.base import AsrModel, Stage
from mpq.models.conformer import ConformerContext, ConformerEncoder, ConformerOptions, subsampled_length
from mpq.text import CharTokenizer, SentencePieceTokenizer, Tokenizer, tokenizer_from_config

SUPPORTED = "supported: CTC models (EncDecCTCModel, EncDecCTCModelBPE) with a ConformerEncoder"


class NemoConformerCtc(AsrModel):
    """Conformer or FastConformer encoder and a linear CTC head; the blank is the last token.

    Args:
        options: The encoder's.
        mel: The features.
        tokenizer: Its V - 1 pieces are the tokens.
    """

    family = "nemo"
    architecture = "conformer-ctc"

    def __init__(self, options: ConformerOptions, mel: LogMelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.preprocessor = nn.Module()
        self.preprocessor.featurizer = LogMel(mel)
        self.encoder = ConformerEncoder(options)
        self.decoder = nn.Module()
        self.decoder.decoder_layers = nn.Sequential(nn.Conv1d(options.width, len(tokenizer.pieces) + 1, 1))
        self.tokenizer = tokenizer
        self.blank_id = len(tokenizer.pieces)
        self.sample_rate = mel.sample_rate
        self.min_samples = self.preprocessor.featurizer.min_samples
        self.stages = self.encoder.stages("encoder")
        self.head = Stage(("decoder.",), self._logits)
        self.eval()

    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.preprocessor.featurizer(waveforms, waveform_lengths)

    def context(self, feature_lengths: Tensor, frames: int) -> ConformerContext:
        return self.encoder.context(feature_lengths, frames)

    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        return subsampled_length(feature_lengths, self.encoder.options.subsampling_factor)

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        tokenizer, blob = self.tokenizer.to_config()
        return {
            "family": self.family,
            "architecture": self.architecture,
            "encoder": asdict(self.encoder.options),
            "features": asdict(self.preprocessor.featurizer.options),
            "tokenizer": tokenizer,
        }, blob

    @classmethod
    def from_config(cls, config: dict[str, Any], blob: bytes) -> "NemoConformerCtc":
        """Returns a model with untrained weights from what `to_config` returned."""
        return cls(
            ConformerOptions(**config["encoder"]),
            LogMelOptions(**config["features"]),
            tokenizer_from_config(config["tokenizer"], blob),
        )

    def _logits(self, encoded: Tensor, _: Any) -> Tensor:
        layer = self.decoder.decoder_layers[0]
        return nn.functional.linear(encoded, layer.weight.squeeze(2), layer.bias)  # (N, T', V)


def read_nemo(path: Path) -> NemoConformerCtc:
    """Returns the model in a `.nemo` archive, float32, eval mode, on the CPU.

    Raises:
        MpqError: Not such an archive, a model that is not supported, or a missing, superfluous or misshapen tensor;
            the message names it.
    """
    members = _read_members(path)
    config = _section(_parse_yaml(path, members), "model_config.yaml", path)
    _refuse_other_models(path, config)
    state = _read_weights(path, members)
    mel = _mel_options(path, _section(config, "preprocessor", path))
    options = _encoder_options(path, _section(config, "encoder", path), mel)
    try:
        model = NemoConformerCtc(options, mel, _tokenizer(path, config, members))
    except MpqError as error:
        raise MpqError(f"{path}: {error}") from None
    for name, buffer in model.preprocessor.named_buffers(prefix="preprocessor"):
        state.setdefault(name, buffer)  # archives need not hold the window and the filter bank
    load_state(model, state, path)
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into the model, which must have exactly these names and shapes.

    Raises:
        MpqError: Names the first tensors that are missing, superfluous, misshapen or not finite.
    """
    own = model.state_dict()
    faults = [f"tensor {name} is missing" for name in own if name not in state and not _is_counter(name)]
    faults += [
        f"tensor {name} {tuple(state[name].shape)} has no place in the model" for name in state if name not in own
    ]
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            faults.append(f"tensor {name}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            faults.append(f"tensor {name} has values that are not finite")
    if faults:
        more = f" (and {len(faults) - 3} more faults)" if len(faults) > 3 else ""
        raise MpqError(f"{path}: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(state, strict=False)  # strict but for the counters, as just checked


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _read_members(path: Path) -> dict[str, bytes]:
    """Returns {normalised name: content} of an archive's files, refusing names and links that leave it."""
    members = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                if name.startswith(("/", "..")) or member.islnk() or member.issym():
                    raise MpqError(f"{path}: the member {member.name!r} is a link or leaves the archive; refused")
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    members[name] = file.read()
    except FileNotFoundError:
        raise MpqError(f"{path}: no such file") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise MpqError(f"{path}: not a whole .nemo (tar) archive: {error}") from None
    return members


def _member(path: Path, members: dict[str, bytes], name: str, why: str) -> bytes:
    if name not in members:
        raise MpqError(
            f"{path}: {why} {name!r}: no such member; the archive has {', '.join(sorted(members)) or 'none'}"
        )
    return members[name]


def _parse_yaml(path: Path, members: dict[str, bytes]) -> dict[str, Any]:
    text = _member(path, members, "model_config.yaml", "configuration")
    try:
        return {"model_config.yaml": yaml.safe_load(text.decode("utf-8"))}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MpqError(f"{path}: model_config.yaml: not plain YAML: {' '.join(str(error).split())[:200]}") from None


def _read_weights(path: Path, members: dict[str, bytes]) -> dict[str, Tensor]:
    data = _member(path, members, "model_weights.ckpt", "weights")
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MpqError(f"{path}: model_weights.ckpt: not a plain dictionary of tensors (refused): {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MpqError(f"{path}: model_weights.ckpt: expected a dictionary of tensors, got {type(state).__name__}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _section(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise MpqError(f"{path}: model_config.yaml: {key}: expected a mapping, got {type(value).__name__}")
    return value


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    target = str(config.get("target", ""))
    encoder = str((config.get("encoder") or {}).get("_target_", ""))
    decoder = str((config.get("decoder") or {}).get("_target_", ""))
    if "joint" in config or "RNNT" in target or "TDT" in target or "RNNT" in decoder:
        raise MpqError(f"{path}: an RNN-T/TDT (transducer) model, {target or decoder}, not a CTC one; {SUPPORTED}")
    for key, value, suffix in (
        ("target", target, ("EncDecCTCModel", "EncDecCTCModelBPE")),
        ("encoder._target_", encoder, ("ConformerEncoder",)),
        ("decoder._target_", decoder, ("ConvASRDecoder",)),
    ):
        if value.rsplit(".", 1)[-1] not in suffix:
            raise MpqError(f"{path}: model_config.yaml: {key}: unknown architecture {value!r}; {SUPPORTED}")


def _options(path: Path, where: str, config: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    """Refuses a configuration in which an option has a value that changes the numbers in a way not built here."""
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise MpqError(f"{path}: model_config.yaml: {where}.{key}: supported {expected}, got {config[key]!r}")


def _number(path: Path, where: str, config: dict[str, Any], key: str, default: Any = None) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MpqError(f"{path}: model_config.yaml: {where}.{key}: expected a number, got {value!r}")
    return value


def _mel_options(path: Path, config: dict[str, Any]) -> LogMelOptions:
    """Reads `preprocessor`; absent keys have NeMo's defaults."""
    where = "preprocessor"
    target = str(config.get("_target_", "AudioToMelSpectrogramPreprocessor"))
    if target.rsplit(".", 1)[-1] != "AudioToMelSpectrogramPreprocessor":
        raise MpqError(f"{path}: model_config.yaml: {where}._target_: unknown features {target!r}")
    _options(
        path,
        where,
        config,
        {
            "log": (True,),
            "log_zero_guard_type": ("add",),
            "frame_splicing": (1,),
            "exact_pad": (False,),
            "mag_power": (2, 2.0),
            "pad_value": (0, 0.0),
            "mel_norm": ("slaney",),
            "use_torchaudio": (False,),
            "window": ("hann", "hamming", "blackman", "bartlett"),
            "normalize": ("per_feature", "all_features", None, "NA"),
        },
    )
    rate = int(_number(path, where, config, "sample_rate", 16000))
    win = config.get("n_window_size") or int(_number(path, where, config, "window_size", 0.02) * rate)
    hop = config.get("n_window_stride") or int(_number(path, where, config, "window_stride", 0.01) * rate)
    normalize = config.get("normalize", "per_feature")
    return LogMelOptions(
        sample_rate=rate,
        n_mels=int(_number(path, where, config, "features", 64)),
        n_fft=int(config.get("n_fft") or 2 ** math.ceil(math.log2(win))),
        win_length=win,
        hop_length=hop,
        window=config.get("window", "hann"),
        preemphasis=float(config.get("preemph", 0.97) or 0.0),
        fmin=float(_number(path, where, config, "lowfreq", 0)),
        fmax=float(_number(path, where, config, "highfreq", rate / 2)),
        log_guard=float(_number(path, where, config, "log_zero_guard_value", 2.0**-24)),
        normalize=normalize if normalize in ("per_feature", "all_features") else "none",
        pad_to=int(_number(path, where, config, "pad_to", 16)),
    )


def _encoder_options(path: Path, config: dict[str, Any], mel: LogMelOptions) -> ConformerOptions:
    """Reads `encoder`; absent keys have NeMo's defaults."""
    where = "encoder"
    width = int(_number(path, where, config, "d_model"))
    _options(
        path,
        where,
        config,
        {
            "feat_out": (-1, None, width),
            "subsampling": ("striding", "dw_striding"),
            "causal_downsampling": (False,),
            "self_attention_model": ("rel_pos",),
            "att_context_size": (None, [-1, -1], [[-1, -1]]),
            "att_context_style": ("regular",),
            "conv_norm_type": ("batch_norm", "layer_norm"),
            "conv_context_size": (None,),
            "reduction": (None,),
        },
    )
    features = int(_number(path, where, config, "feat_in", mel.n_mels))
    if features != mel.n_mels:
        raise MpqError(f"{path}: model_config.yaml: encoder.feat_in is {features}, preprocessor.features {mel.n_mels}")
    kernel = int(_number(path, where, config, "conv_kernel_size", 31))
    channels = int(_number(path, where, config, "subsampling_conv_channels", -1))
    try:
        return ConformerOptions(
            features=features,
            layers=int(_number(path, where, config, "n_layers")),
            width=width,
            heads=int(_number(path, where, config, "n_heads", 4)),
            ffn_width=int(width * _number(path, where, config, "ff_expansion_factor", 4)),
            kernel_size=kernel,
            subsampling=config.get("subsampling", "striding"),
            subsampling_factor=int(_number(path, where, config, "subsampling_factor", 4)),
            subsampling_channels=width if channels == -1 else channels,
            use_bias=bool(config.get("use_bias", True)),
            scale_input=bool(config.get("xscaling", True)),
            conv_norm=config.get("conv_norm_type", "batch_norm"),
        )
    except MpqError as error:
        raise MpqError(f"{path}: model_config.yaml: {error}") from None


def _tokenizer(path: Path, config: dict[str, Any], members: dict[str, bytes]) -> Tokenizer:
    """Returns the tokenizer that the archive holds, whose size must be that of the CTC head."""
    section = config.get("tokenizer")
    if isinstance(section, dict):
        if section.get("type") != "bpe":
            raise MpqError(f"{path}: tokenizer.type: supported 'bpe' (SentencePiece), got {section.get('type')!r}")
        reference = str(section.get("model_path", ""))
        name = posixpath.normpath(reference.removeprefix("nemo:"))
        if name.startswith(("/", "..")):
            raise MpqError(f"{path}: tokenizer.model_path: {reference!r} leaves the archive; refused")
        tokenizer: Tokenizer = SentencePieceTokenizer(_member(path, members, name, "tokenizer.model_path"))
    else:
        labels = _section(config, "decoder", path).get("vocabulary") or config.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise MpqError(f"{path}: model_config.yaml: decoder.vocabulary: expected a list of strings")
        tokenizer = CharTokenizer(labels)
    classes = _section(config, "decoder", path).get("num_classes", -1)
    if classes not in (-1, len(tokenizer.pieces)):
        raise MpqError(
            f"{path}: decoder.num_classes is {classes}, but the tokenizer has {len(tokenizer.pieces)} tokens"
        )
    return tokenizer
