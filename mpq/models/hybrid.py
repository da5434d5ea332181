"""The hybrid CTC/attention Conformer of Li et al. 2023, section 2: mpq's own model, which `mpq train` trains.

Log-mel features (with pitch, as an option), a Conformer encoder, a linear CTC head and a Transformer decoder; without
decoder layers it is a CTC model. The last class is the blank of the CTC head and <sos>/<eos> of the decoder.

Legend: N utterances, T feature frames, T' encoder frames, D width, U tokens, V tokens of the vocabulary, C = V + 1.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mpq.models.attention_decoder import DecoderOptions, TransformerDecoder
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerContext, ConformerEncoder, ConformerOptions
from mpq.models.heads import AttentionHead, CtcHead, Head
from mpq.models.segment import Segment
from mpq.speech.features import LogMel, LogMelOptions
from mpq.speech.text import Tokenizer, tokenizer_from_config

PITCH_FEATURES = 3


class HybridConformer(AsrModel):
    """Conformer encoder, CTC head, Transformer decoder.

    Args:
        encoder: The shape of the encoder.
        decoder: The shape of the attention decoder; None for a CTC model.
        mel: The log-mel features. The encoder takes these, and three pitch features more if its `features` say so.
        tokenizer: The V tokens.
    """

    family = "mpq"

    def __init__(
        self, encoder: ConformerOptions, decoder: DecoderOptions | None, mel: LogMelOptions, tokenizer: Tokenizer
    ) -> None:
        super().__init__()
        assert encoder.features - mel.n_mels in (0, PITCH_FEATURES)
        self.architecture = "conformer-ctc-attention" if decoder else "conformer-ctc"
        self.featurizer = LogMel(mel)
        self.encoder = ConformerEncoder(encoder)
        self.ctc = nn.Linear(encoder.width, len(tokenizer.pieces) + 1)
        self.decoder = TransformerDecoder(encoder.width, len(tokenizer.pieces) + 1, decoder) if decoder else None
        self.tokenizer = tokenizer
        self.blank_id = len(tokenizer.pieces)
        self.sample_rate = mel.sample_rate
        # two encoder frames at least, so that unpadded subsampling leaves something
        frames = next(n for n in range(2, 10**6) if self.encoder.encoded_lengths(n) >= 2)
        self.min_samples = frames * mel.hop_length
        self.eval()

    @property
    def mel(self) -> LogMelOptions:
        return self.featurizer.options

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.encoder.segments("encoder")

    @property
    def output_heads(self) -> tuple[Head, ...]:
        ctc = CtcHead("ctc.", self.ctc, self.blank_id)
        return (ctc, AttentionHead("decoder.", self.decoder, self.blank_id, ctc)) if self.decoder else (ctc,)

    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, lengths = self.featurizer(waveforms, waveform_lengths)
        if self.encoder.options.features == features.shape[2]:
            return features, lengths
        from mpq.speech.pitch import pitch_features

        mel = self.featurizer.options
        pitch = pitch_features(waveforms, waveform_lengths, mel.sample_rate, mel.hop_length, features.shape[1])
        return torch.cat((features, pitch), dim=2), lengths

    def feature_lengths(self, waveform_lengths: Tensor) -> Tensor:
        return self.featurizer.lengths(waveform_lengths)

    def context(self, feature_lengths: Tensor, frames: int) -> ConformerContext:
        return self.encoder.context(feature_lengths, frames)

    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        return self.encoder.encoded_lengths(feature_lengths)

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        tokenizer, blob = self.tokenizer.to_config()
        return {
            "family": self.family,
            "architecture": self.architecture,
            "encoder": asdict(self.encoder.options),
            "decoder": asdict(self.decoder.options) if self.decoder else None,
            "features": asdict(self.featurizer.options),
            "tokenizer": tokenizer,
        }, blob

    @classmethod
    def from_config(cls, config: dict[str, Any], blob: bytes) -> "HybridConformer":
        """Returns a model with untrained weights from what `to_config` returned."""
        return cls(
            ConformerOptions(**config["encoder"]),
            DecoderOptions(**config["decoder"]) if config["decoder"] else None,
            LogMelOptions(**config["features"]),
            tokenizer_from_config(config["tokenizer"], blob),
        )
