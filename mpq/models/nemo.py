"""NeMo's Conformer-CTC and FastConformer-CTC models, read without NeMo.

`mpq.models.nemo_archive` reads the archive, `mpq.models.nemo_config` its configuration. Checked against NeMo 3.0.0.

Legend: N utterances, T' encoder frames, D encoder width, V tokens with blank.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.models.base import AsrModel, load_state
from mpq.models.conformer import ConformerContext, ConformerEncoder, ConformerOptions
from mpq.models.heads import CtcHead, Head
from mpq.models.nemo_archive import member, read_members, read_weights, read_yaml
from mpq.models.nemo_config import NemoConfig, check_target, encoder_options, mel_options, read_config, tokenizer_member
from mpq.models.segment import Segment
from mpq.speech.features import LogMel, LogMelOptions
from mpq.speech.text import CharTokenizer, SentencePieceTokenizer, Tokenizer, tokenizer_from_config

_NOT_NEMO = ("ffn2_width", "ffn_rank", "ffn2_rank", "subsampling_padding", "dropout")
"""Options that no archive of NeMo sets; a model whose feed-forward modules were changed since may."""


class _Preprocessor(nn.Module):
    """The features under the name that NeMo gives them."""

    def __init__(self, mel: LogMelOptions) -> None:
        super().__init__()
        self.featurizer = LogMel(mel)


class _ConvDecoder(nn.Module):
    """NeMo's CTC output layer: a convolution over one frame."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.decoder_layers = nn.Sequential(nn.Conv1d(width, classes, 1))

    def forward(self, encoded: Tensor) -> Tensor:
        """Returns the (N, T', V) logits of the (N, T', D) encoder output."""
        layer = self.decoder_layers[0]
        assert isinstance(layer, nn.Conv1d)
        return nn.functional.linear(encoded, layer.weight.squeeze(2), layer.bias)


class NemoConformerCtc(AsrModel):
    """Conformer or FastConformer encoder and a linear CTC head; the blank is the last token.

    Args:
        options: The shape of the encoder.
        mel: The features.
        tokenizer: The tokenizer, whose V - 1 pieces are the tokens.
    """

    family = "nemo"
    architecture = "conformer-ctc"

    def __init__(self, options: ConformerOptions, mel: LogMelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.preprocessor = _Preprocessor(mel)
        self.encoder = ConformerEncoder(options)
        self.decoder = _ConvDecoder(options.width, len(tokenizer.pieces) + 1)
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
        return (CtcHead("decoder.", self.decoder, self.blank_id),)

    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.preprocessor.featurizer(waveforms, waveform_lengths)
        return found

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


def read_nemo(path: Path) -> NemoConformerCtc:
    """Returns the model in a `.nemo` archive, float32, eval mode, on the CPU.

    Raises:
        MpqError: Not such an archive, a model that is not supported, or a missing, superfluous or misshapen tensor;
            the message names it.
    """
    members = read_members(path)
    raw = read_yaml(path, members)
    check_target(path, raw)
    state = read_weights(path, members)
    config = read_config(path, raw)
    options, mel = encoder_options(path, config), mel_options(config.preprocessor)
    try:
        model = NemoConformerCtc(options, mel, _tokenizer(path, config, members))
        for name, buffer in model.preprocessor.named_buffers(prefix="preprocessor"):
            state.setdefault(name, buffer)  # archives need not hold the window and the filter bank
        load_state(model, state)
    except (MpqError, RuntimeError, ValueError) as error:  # torch's own words where a size is beyond reason
        message = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise MpqError(f"{path}: {message}") from None
    return model


def _tokenizer(path: Path, config: NemoConfig, members: dict[str, bytes]) -> Tokenizer:
    """Returns the tokenizer that the archive holds, whose size must be that of the CTC head."""
    tokenizer: Tokenizer
    if config.tokenizer is not None:
        name = tokenizer_member(path, config.tokenizer)
        tokenizer = SentencePieceTokenizer(member(path, members, name, "tokenizer.model_path"))
    else:
        labels = config.decoder.vocabulary or config.labels
        if labels is None:
            raise MpqError(f"{path}: model_config.yaml: decoder.vocabulary: expected a list of strings, got none")
        tokenizer = CharTokenizer(labels)
    classes = config.decoder.num_classes
    if classes not in (-1, len(tokenizer.pieces)):
        raise MpqError(
            f"{path}: decoder.num_classes is {classes}, but the tokenizer has {len(tokenizer.pieces)} tokens"
        )
    return tokenizer
