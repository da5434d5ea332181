"""The hybrid CTC/attention Conformer of Li et al. 2023, section 2: mpq's own model, which `mpq train` trains.

Log-mel features (with pitch, as an option), a Conformer encoder, a linear CTC head and a Transformer decoder; without
decoder layers it is a CTC model. The last class is the blank of the CTC head and <sos>/<eos> of the decoder.

Legend: N utterances, T feature frames, T' encoder frames, D width, U tokens, V tokens of the vocabulary, C = V + 1.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.models.attention_decoder import DecoderOptions, TransformerDecoder, decoder_context
from mpq.models.base import AsrModel, Segment
from mpq.models.conformer import ConformerContext, ConformerEncoder, ConformerOptions
from mpq.speech.decoding import NextLogProbs, ctc_greedy
from mpq.speech.features import LogMel, LogMelOptions
from mpq.speech.text import Tokenizer, tokenizer_from_config

PITCH_FEATURES = 3


class HybridConformer(AsrModel):
    """Conformer encoder, CTC head, Transformer decoder.

    Args:
        encoder: Its shape.
        decoder: Its shape; None for a CTC model.
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
    def head(self) -> Segment:
        return Segment(("ctc.",), lambda encoded, _: self.ctc(encoded))

    @property
    def decoder_segments(self) -> tuple[Segment, ...]:
        if self.decoder is None:
            return ()
        return tuple(
            Segment(
                tuple(f"decoder.{module}." for module in modules),
                lambda hidden, context, step=step: step(hidden, context.decoder),
            )
            for modules, step in self.decoder.steps()
        )

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

    @torch.no_grad()
    def output_context(self, features: Tensor, feature_lengths: Tensor) -> tuple[ConformerContext, Tensor | None]:
        context = self.context(feature_lengths, features.shape[1])
        if self.decoder is None:
            return context, None
        encoded, lengths = self.encode(features, feature_lengths)
        found = ctc_greedy(self.ctc_log_probs(encoded), lengths, self.blank_id)
        prefixes = [torch.tensor([self.blank_id, *tokens], device=encoded.device) for tokens in found]
        rows = torch.tensor([len(prefix) for prefix in prefixes], device=encoded.device)
        padded = nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_value=self.blank_id)  # (N, U + 1)
        return replace(context, decoder=decoder_context(padded, lengths, encoded.shape[1])), rows

    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        return self.encoder.encoded_lengths(feature_lengths)

    def attention_logits(self, prefixes: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        assert self.decoder is not None, "a CTC model has no attention decoder"
        return self.decoder(prefixes, encoded, encoded_lengths)

    def next_token(self, encoded: Tensor, encoded_lengths: Tensor) -> NextLogProbs | None:
        return self.decoder.scorer(encoded, encoded_lengths) if self.decoder else None

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
