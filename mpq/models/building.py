"""From a recipe to an untrained model."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.features import LogMelOptions, slaney_filter_bank
from mpq.manifests import read_data
from mpq.models.conformer import ConformerOptions, subsampled_length
from mpq.models.decoder import DecoderOptions
from mpq.models.hybrid import PITCH_FEATURES, HybridConformer
from mpq.recipes import load_recipe
from mpq.text import Tokenizer, WordTokenizer, train_tokenizer


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


def described_model(path: Path, overrides: Sequence[str] = ()) -> HybridConformer:
    """Returns the model of a recipe file with weights drawn at random.

    The size of a BPE vocabulary is in the recipe; characters and words are counted in the training transcripts.

    Raises:
        MpqError: A faulty recipe, or a vocabulary that cannot be counted because the data are not there.
    """
    recipe = load_recipe(path, overrides, stages=[], need_files=False)
    if recipe.checkpoint:
        raise MpqError(f"{path}: describes no model but names one; inspect {recipe.checkpoint}")
    if size := recipe.tokens.vocabulary_size:
        tokenizer: Tokenizer = WordTokenizer([str(index) for index in range(size)])
    elif not recipe.data.train:
        raise MpqError(
            f"{path}: [data] train: expected a manifest, got none; the vocabulary ([tokens] type = "
            f"{recipe.tokens.type!r}) is that of the training transcripts"
        )
    else:
        try:
            texts = [item.text or "" for name in recipe.data.train for item in read_data(recipe.path(name))]
        except MpqError as error:
            raise MpqError(
                f"{path}: the vocabulary ([tokens] type = {recipe.tokens.type!r}) is that of the training transcripts, "
                f"which are not there: {error}"
            ) from None
        tokenizer = train_tokenizer(recipe.tokens.type, texts)
    try:
        return build_model(recipe, tokenizer)
    except MpqError as error:
        raise MpqError(f"{path}: {error}") from None


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
