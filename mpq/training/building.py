"""From a recipe to an untrained model."""

import warnings

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.models.attention_decoder import DecoderOptions
from mpq.models.conformer import ConformerOptions, subsampled_length
from mpq.models.hybrid import PITCH_FEATURES, HybridConformer
from mpq.speech.features import LogMelOptions, slaney_filter_bank
from mpq.speech.text import Tokenizer


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> HybridConformer:
    """Returns the model that a recipe describes, its weights drawn from torch's generator.

    Raises:
        MpqError: Options that do not go together.
    """
    mel, model, encoder = mel_options(recipe), recipe.model, encoder_options(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchaudio's, of what is an error here
        empty = int((slaney_filter_bank(mel).sum(dim=1) == 0).sum())
    if empty:
        raise MpqError(
            f"[features] n_mels: {empty} of {mel.n_mels} bands lie between the frequencies of a window of "
            f"{mel.win_length} samples; expected fewer, or a longer window_ms"
        )
    if subsampled_length(mel.n_mels, model.subsampling_factor, model.subsampling_padding) < 1:
        raise MpqError(f"[features] n_mels: {mel.n_mels} leaves no band after the subsampling; expected more")
    decoder = None
    if model.decoder_layers:
        decoder = DecoderOptions(model.decoder_layers, model.decoder_heads, model.decoder_ffn_width, model.dropout)
    return HybridConformer(encoder, decoder, mel, tokenizer)


def encoder_options(recipe: Recipe) -> ConformerOptions:
    """Returns the shape of the encoder that a recipe describes.

    Raises:
        MpqError: Options that do not go together.
    """
    model = recipe.model
    return ConformerOptions(
        features=recipe.features.n_mels + (PITCH_FEATURES if recipe.features.pitch else 0),
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        ffn_width=model.ffn_width,
        ffn2_width=model.ffn2_width,
        ffn_rank=model.ffn_rank,
        ffn2_rank=model.ffn2_rank,
        kernel_size=model.kernel_size,
        subsampling=model.subsampling,
        subsampling_factor=model.subsampling_factor,
        subsampling_channels=model.subsampling_channels or model.width,
        subsampling_padding=model.subsampling_padding,
        conv_norm=model.conv_norm,
        dropout=model.dropout,
    )


def mel_options(recipe: Recipe) -> LogMelOptions:
    """Returns the features of a recipe; the window is padded to the next power of two for the Fourier transform."""
    features = recipe.features
    window = max(2, round(features.window_ms * features.sample_rate / 1000))
    return LogMelOptions(
        sample_rate=features.sample_rate,
        n_mels=features.n_mels,
        n_fft=1 << (window - 1).bit_length(),
        win_length=window,
        hop_length=max(1, round(features.hop_ms * features.sample_rate / 1000)),
        fmax=features.sample_rate / 2,
    )
