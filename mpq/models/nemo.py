"""NeMo's Conformer-CTC and FastConformer-CTC archives, read without NeMo.

A `.nemo` file is a tar (old ones gzipped) of `model_config.yaml`, `model_weights.ckpt` and the tokenizer's files. The
archive is read in memory: nothing is extracted, nothing is unpickled but tensors, and no name may lead out of it.

Checked against NeMo 3.0.0. Legend: N utterances, T' encoder frames, D encoder width, V tokens with blank.
"""

import io
import lzma
import math
import pickle
import posixpath
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.base import AsrModel, load_state
from mpq.models.conformer import ConformerContext, ConformerEncoder, ConformerOptions
from mpq.models.heads import CtcHead, Head
from mpq.models.segment import Segment
from mpq.speech.features import LogMel, LogMelOptions
from mpq.speech.text import CharTokenizer, SentencePieceTokenizer, Tokenizer, tokenizer_from_config

_NOT_NEMO = ("ffn2_width", "ffn_rank", "ffn2_rank", "subsampling_padding", "dropout")
"""Options that no archive of NeMo sets; a model whose feed-forward modules were changed since may."""

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
        self.eval()

    @property
    def mel(self) -> LogMelOptions:
        return self.preprocessor.featurizer.options

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.encoder.segments("encoder")

    @property
    def output_heads(self) -> tuple[Head, ...]:
        return (CtcHead("decoder.", self._logits, self.blank_id),)

    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.preprocessor.featurizer(waveforms, waveform_lengths)

    def feature_lengths(self, waveform_lengths: Tensor) -> Tensor:
        return self.preprocessor.featurizer.lengths(waveform_lengths)

    def context(self, feature_lengths: Tensor, frames: int) -> ConformerContext:
        return self.encoder.context(feature_lengths, frames)

    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        return self.encoder.encoded_lengths(feature_lengths)

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        tokenizer, blob = self.tokenizer.to_config()
        defaults = {field.name: field.default for field in fields(ConformerOptions) if field.name in _NOT_NEMO}
        encoder = asdict(self.encoder.options)
        return {
            "family": self.family,
            "architecture": self.architecture,
            "encoder": {key: value for key, value in encoder.items() if key not in defaults or value != defaults[key]},
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

    def _logits(self, encoded: Tensor) -> Tensor:
        layer = self.decoder.decoder_layers[0]
        return nn.functional.linear(encoded, layer.weight.squeeze(2), layer.bias)  # (N, T', V)


def is_nemo(path: Path) -> bool:
    """Returns whether a file is called `.nemo`, or is a tar archive, whatever its name."""
    return path.suffix == ".nemo" or tarfile.is_tarfile(path)


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
        for name, buffer in model.preprocessor.named_buffers(prefix="preprocessor"):
            state.setdefault(name, buffer)  # archives need not hold the window and the filter bank
        load_state(model, state)
    except (MpqError, RuntimeError, ValueError) as error:  # torch's own words where a size is beyond reason
        message = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise MpqError(f"{path}: {message}") from None
    return model


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
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise MpqError(f"{path}: not a whole .nemo (tar) archive: {str(error).splitlines()[0]}") from None
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise MpqError(
                f"{path}: model_weights.ckpt: tensor {name}: expected plain real numbers, got {tensor.dtype}"
            )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _section(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise MpqError(f"{path}: model_config.yaml: {key}: expected a mapping, got {type(value).__name__}")
    return value


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    target = str(config.get("target", ""))
    encoder, decoder = (str(_section(config, key, path).get("_target_", "")) for key in ("encoder", "decoder"))
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
        if config.get(key) is not None and config[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise MpqError(f"{path}: model_config.yaml: {where}.{key}: supported {expected}, got {config[key]!r}")


class _Values:
    """A section of the configuration; values that are absent or null have NeMo's default.

    Args:
        path: The archive.
        where: The section's name.
        section: Its content.
    """

    def __init__(self, path: Path, where: str, section: dict[str, Any]) -> None:
        self.path, self.where, self.section = path, where, section

    def _get(self, key: str, default: Any, expected: str, is_good: Callable[[Any], bool]) -> Any:
        value = self.section.get(key)
        value = default if value is None else value
        if not is_good(value):
            raise MpqError(f"{self.path}: model_config.yaml: {self.where}.{key}: expected {expected}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None, least: float = 0.0) -> float:
        return float(self._get(key, default, f"a number, {least:g} or more", lambda v: _is_number(v) and v >= least))

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        expected = f"a whole number, {least} or more"
        return int(self._get(key, default, expected, lambda v: _is_number(v) and v == int(v) and v >= least))

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, default, "true or false", lambda v: isinstance(v, bool))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


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
    values = _Values(path, where, config)
    rate = values.whole("sample_rate", 16000)
    window = values.whole("n_window_size", int(values.number("window_size", 0.02) * rate))
    mel = LogMelOptions(
        sample_rate=rate,
        n_mels=values.whole("features", 64),
        n_fft=values.whole("n_fft", 2 ** math.ceil(math.log2(window)), least=window),
        win_length=window,
        hop_length=values.whole("n_window_stride", int(values.number("window_stride", 0.01) * rate)),
        window=config.get("window") or "hann",
        preemphasis=values.number("preemph", 0.97) if config.get("preemph", 0.97) is not None else 0.0,
        fmin=values.number("lowfreq", 0.0),
        fmax=values.number("highfreq", rate / 2, least=1.0),
        log_guard=values.number("log_zero_guard_value", 2.0**-24, least=1e-30),
        normalize={"per_feature": "per_feature", "all_features": "all_features"}.get(
            str(config.get("normalize", "per_feature")), "none"
        ),
        pad_to=values.whole("pad_to", 16, least=0),
    )
    if not mel.fmin < mel.fmax <= rate / 2:
        raise MpqError(
            f"{path}: model_config.yaml: {where}: expected lowfreq < highfreq <= {rate / 2:g}, got {mel.fmax:g}"
        )
    return mel


def _encoder_options(path: Path, config: dict[str, Any], mel: LogMelOptions) -> ConformerOptions:
    """Reads `encoder`; absent keys have NeMo's defaults."""
    where = "encoder"
    values = _Values(path, where, config)
    width = values.whole("d_model")
    kernel = values.whole("conv_kernel_size", 31)
    _options(
        path,
        where,
        config,
        {
            "feat_out": (-1, width),
            "subsampling": ("striding", "dw_striding"),
            "causal_downsampling": (False,),
            "self_attention_model": ("rel_pos",),
            "att_context_size": ([-1, -1], [[-1, -1]]),
            "att_context_style": ("regular",),
            "conv_norm_type": ("batch_norm", "layer_norm"),
            "conv_context_size": ([kernel // 2, kernel // 2],),
            "reduction": (),
        },
    )
    features = values.whole("feat_in", mel.n_mels)
    if features != mel.n_mels:
        raise MpqError(f"{path}: model_config.yaml: encoder.feat_in is {features}, preprocessor.features {mel.n_mels}")
    channels = values.whole("subsampling_conv_channels", -1, least=-1)
    if channels == 0:
        raise MpqError(
            f"{path}: model_config.yaml: encoder.subsampling_conv_channels: expected -1, or 1 or more, got 0"
        )
    try:
        return ConformerOptions(
            features=features,
            layers=values.whole("n_layers"),
            width=width,
            heads=values.whole("n_heads", 4),
            ffn_width=int(width * values.number("ff_expansion_factor", 4.0, least=1 / width)),
            kernel_size=kernel,
            subsampling=config.get("subsampling") or "striding",
            subsampling_factor=values.whole("subsampling_factor", 4),
            subsampling_channels=width if channels == -1 else channels,
            use_bias=values.flag("use_bias", True),
            scale_input=values.flag("xscaling", True),
            conv_norm=config.get("conv_norm_type") or "batch_norm",
        )
    except MpqError as error:
        raise MpqError(
            f"{path}: model_config.yaml: {str(error).removeprefix(f'{path}: model_config.yaml: ')}"
        ) from None


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
    if classes not in (None, -1, len(tokenizer.pieces)):
        raise MpqError(
            f"{path}: decoder.num_classes is {classes}, but the tokenizer has {len(tokenizer.pieces)} tokens"
        )
    return tokenizer
