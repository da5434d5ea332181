"""NeMo's model_config.yaml, validated: the sections that say a CTC model's features, encoder and tokenizer.

Keys that are absent or null have NeMo's default. A key that is not declared here changes nothing that mpq computes (it
says how the model was trained); an option that would change the numbers in a way that is not built is refused.
"""

import math
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from mpq.errors import MpqError
from mpq.models.conformer import ConformerOptions
from mpq.models.nemo_archive import CONFIG_FILE
from mpq.speech.features import LogMelOptions

SUPPORTED = "supported: CTC models (EncDecCTCModel, EncDecCTCModelBPE) with a ConformerEncoder"


def _number(least: float) -> Callable[[Any], float]:
    """Returns the validator of a number."""

    def check(value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value < 1e9:
            raise ValueError(f"a number, {least:g} or more")
        return float(value)

    return check


def _whole(least: int) -> Callable[[Any], int]:
    """Returns the validator of a whole number, which may be written as 4.0."""

    def check(value: Any) -> int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value < 1e9 or value != int(value):
            raise ValueError(f"a whole number, {least} or more")
        return int(value)

    return check


def _one_of(*values: Any) -> Callable[[Any], Any]:
    """Returns the validator of a value that may be one of these, lists among them."""

    def check(value: Any) -> Any:
        if value not in values:
            raise ValueError(" or ".join(map(repr, values)) or "nothing")
        return value

    return check


def _is_features(target: str) -> str:
    if target.rsplit(".", 1)[-1] != "AudioToMelSpectrogramPreprocessor":
        raise ValueError("an AudioToMelSpectrogramPreprocessor (no other features are known)")
    return target


Whole = Annotated[int, PlainValidator(_whole(1))]
Number = Annotated[float, PlainValidator(_number(0.0))]
OneOrMore = Annotated[float, PlainValidator(_number(1.0))]
Guard = Annotated[float, PlainValidator(_number(1e-30))]
Padding = Annotated[int, PlainValidator(_whole(0))]
Channels = Annotated[int, PlainValidator(_whole(-1))]
FullContext = Annotated[Any, PlainValidator(_one_of([-1, -1], [[-1, -1]]))]
Absent = Annotated[Any, PlainValidator(_one_of())]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    nulls: ClassVar[dict[str, Any]] = {}
    """{key: the meaning of null}, where it is not NeMo's default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {key: cls.nulls.get(key) if value is None else value for key, value in values.items()}
        return {key: value for key, value in known.items() if value is not None}


class Preprocessor(_Section):
    """The features."""

    nulls = {"preemph": 0.0, "normalize": "NA"}

    target: Annotated[str, AfterValidator(_is_features)] = Field("AudioToMelSpectrogramPreprocessor", alias="_target_")
    sample_rate: Whole = 16000
    window_size: Number = 0.02
    window_stride: Number = 0.01
    n_window_size: Whole | None = None
    n_window_stride: Whole | None = None
    window: Literal["hann", "hamming", "blackman", "bartlett"] = "hann"
    normalize: Literal["per_feature", "all_features", "NA"] = "per_feature"
    n_fft: Whole | None = None
    preemph: Number = 0.97
    features: Whole = 64
    lowfreq: Number = 0.0
    highfreq: OneOrMore | None = None
    log: Literal[True] = True
    log_zero_guard_type: Literal["add"] = "add"
    log_zero_guard_value: Guard = 2.0**-24
    frame_splicing: Literal[1] = 1
    exact_pad: Literal[False] = False
    pad_to: Padding = 16
    pad_value: Literal[0] = 0
    mag_power: Literal[2] = 2
    mel_norm: Literal["slaney"] = "slaney"
    use_torchaudio: Literal[False] = False

    @property
    def window_samples(self) -> int:
        """The window, samples."""
        return self.n_window_size or int(self.window_size * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        """The step from one window to the next, samples."""
        return self.n_window_stride or int(self.window_stride * self.sample_rate)

    @model_validator(mode="after")
    def _check(self) -> Self:
        rate, window = self.sample_rate, self.window_samples
        for key, value in (("n_window_size", window), ("n_window_stride", self.hop_samples)):
            if value < 1:
                raise ValueError(f"{key}: expected a whole number, 1 or more, got {value}")
        if self.n_fft is not None and self.n_fft < window:
            raise ValueError(f"n_fft: expected a whole number, {window} or more, got {self.n_fft}")
        highest = rate / 2 if self.highfreq is None else self.highfreq
        if not self.lowfreq < highest <= rate / 2:
            expected = f"expected lowfreq < highfreq <= {rate / 2:g}"
            raise ValueError(f"highfreq: {expected}, got {self.lowfreq:g} and {highest:g}")
        return self


class Encoder(_Section):
    """The encoder."""

    n_layers: Whole
    d_model: Whole
    feat_in: Whole | None = None
    feat_out: Channels = -1
    n_heads: Whole = 4
    ff_expansion_factor: Number = 4.0
    conv_kernel_size: Whole = 31
    conv_norm_type: Literal["batch_norm", "layer_norm"] = "batch_norm"
    conv_context_size: list[int] | None = None
    subsampling: Literal["striding", "dw_striding"] = "striding"
    subsampling_factor: Whole = 4
    subsampling_conv_channels: Channels = -1
    causal_downsampling: Literal[False] = False
    self_attention_model: Literal["rel_pos"] = "rel_pos"
    att_context_size: FullContext = None
    att_context_style: Literal["regular"] = "regular"
    use_bias: bool = True
    xscaling: bool = True
    reduction: Absent = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        side = self.conv_kernel_size // 2
        for key, value, allowed in (
            ("feat_out", self.feat_out, (-1, self.d_model)),
            ("conv_context_size", self.conv_context_size, (None, [side, side])),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: expected {allowed[-1]}, got {value}")
        if self.subsampling_conv_channels == 0:
            raise ValueError("subsampling_conv_channels: expected -1, or 1 or more, got 0")
        if self.ff_expansion_factor * self.d_model < 1:
            raise ValueError(f"ff_expansion_factor: expected 1 / d_model or more, got {self.ff_expansion_factor:g}")
        return self


class Decoder(_Section):
    """The CTC head."""

    vocabulary: list[str] | None = None
    num_classes: int = -1


class TokenizerSection(_Section):
    """The tokenizer of a model whose tokens are not characters."""

    type: Literal["bpe"]
    model_path: str = ""


class NemoConfig(_Section):
    """The part of model_config.yaml that mpq reads."""

    preprocessor: Preprocessor
    encoder: Encoder
    decoder: Decoder
    tokenizer: TokenizerSection | None = None
    labels: list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        features = self.encoder.feat_in
        if features not in (None, self.preprocessor.features):
            raise ValueError(f"encoder.feat_in is {features}, preprocessor.features {self.preprocessor.features}")
        return self


def check_target(path: Path, config: Any) -> None:
    """Raises MpqError unless the configuration is that of a model that can be read here."""
    config = _mapping(path, "", config)
    target = str(config.get("target", ""))
    encoder, decoder = (str(_mapping(path, key, config.get(key)).get("_target_", "")) for key in ("encoder", "decoder"))
    if "joint" in config or "RNNT" in target or "TDT" in target or "RNNT" in decoder:
        raise MpqError(f"{path}: an RNN-T/TDT (transducer) model, {target or decoder}, not a CTC one; {SUPPORTED}")
    for key, value, suffix in (
        ("target", target, ("EncDecCTCModel", "EncDecCTCModelBPE")),
        ("encoder._target_", encoder, ("ConformerEncoder",)),
        ("decoder._target_", decoder, ("ConvASRDecoder",)),
    ):
        if value.rsplit(".", 1)[-1] not in suffix:
            raise MpqError(f"{path}: {CONFIG_FILE}: {key}: unknown architecture {value!r}; {SUPPORTED}")


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        where = f"{CONFIG_FILE}: {key}" if key else CONFIG_FILE
        raise MpqError(f"{path}: {where}: expected a mapping, got {type(value).__name__}")
    return value


def read_config(path: Path, config: Any) -> NemoConfig:
    """Returns the validated configuration.

    Raises:
        MpqError: A value that is wrong or not supported; the message has the key, what was expected and what was got.
    """
    try:
        return NemoConfig.model_validate(config)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key, got = ".".join(map(str, fault["loc"])), repr(fault["input"])[:200]
        context = fault.get("ctx", {})
        if fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of several keys: they are in the text
            text = f"{key}{key and '.'}{context['error']}"
        elif fault["type"] == "missing":
            text = f"{key}: expected a value, got none"
        else:
            words = fault["msg"].removeprefix("Input should be ")
            expected = context.get("error") or context.get("expected") or _EXPECTED.get(fault["type"], words)
            text = f"{key}: expected {expected}, got {got}"
        raise MpqError(f"{path}: {CONFIG_FILE}: {text}") from None


_EXPECTED = {"model_type": "a mapping", "bool_type": "true or false", "list_type": "a list", "string_type": "a string"}
"""{type of pydantic's error: what was expected, in words of YAML}."""


def mel_options(section: Preprocessor) -> LogMelOptions:
    """Returns the features that a section describes."""
    window = section.window_samples
    return LogMelOptions(
        sample_rate=section.sample_rate,
        n_mels=section.features,
        n_fft=section.n_fft or 2 ** math.ceil(math.log2(window)),
        win_length=window,
        hop_length=section.hop_samples,
        window=section.window,
        preemphasis=section.preemph,
        fmin=section.lowfreq,
        fmax=section.sample_rate / 2 if section.highfreq is None else section.highfreq,
        log_guard=section.log_zero_guard_value,
        normalize="none" if section.normalize == "NA" else section.normalize,
        pad_to=section.pad_to,
    )


def encoder_options(path: Path, config: NemoConfig) -> ConformerOptions:
    """Returns the shape of the encoder.

    Raises:
        MpqError: Values that contradict each other.
    """
    section = config.encoder
    channels = section.subsampling_conv_channels
    try:
        return ConformerOptions(
            features=config.preprocessor.features,
            layers=section.n_layers,
            width=section.d_model,
            heads=section.n_heads,
            ffn_width=int(section.d_model * section.ff_expansion_factor),
            kernel_size=section.conv_kernel_size,
            subsampling=section.subsampling,
            subsampling_factor=section.subsampling_factor,
            subsampling_channels=section.d_model if channels == -1 else channels,
            use_bias=section.use_bias,
            scale_input=section.xscaling,
            conv_norm=section.conv_norm_type,
        )
    except MpqError as error:
        raise MpqError(f"{path}: {CONFIG_FILE}: {error}") from None


def tokenizer_member(path: Path, section: TokenizerSection) -> str:
    """Returns the name of the tokenizer's file in the archive, refusing one that leaves it."""
    name = posixpath.normpath(section.model_path.removeprefix("nemo:"))
    if name.startswith(("/", "..")):
        raise MpqError(f"{path}: tokenizer.model_path: {section.model_path!r} leaves the archive; refused")
    return name
