"""A recipe and its sections, but for those of training loops. Relative paths start at the folder of the recipe."""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field

from mpq.config.training import AugmentConfig, FinetuneAugmentConfig, FinetuneConfig, SearchConfig, TrainConfig
from mpq.config.types import (
    Count,
    DecodeMethod,
    Fraction,
    Name,
    Output,
    PerBlock,
    Positive,
    Ranks,
    ScoreMethod,
    Section,
    Seed,
    Share,
    Whole,
)
from mpq.quantization.spec import RoundingName, SchemeName

Stage = Literal["train", "search", "evaluate", "sensitivity", "allocate", "pack", "finetune", "compare"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""All stages that a recipe may name, in the order in which they run."""


class DataConfig(Section):
    """Audio and transcripts: manifests (JSON lines) or Kaldi data directories."""

    root: str = Field("", description="Folder from which the paths below start, relative to the recipe's folder.")
    train: list[Name] = Field([], description="Data to train on; the first also serves as calibration audio.")
    dev: Name | None = Field(None, description="Held-out data, by which epochs are chosen and training stops.")
    calibration: Name | None = Field(
        None, description="Audio for sensitivities and rounding; default: the first of train."
    )
    test: dict[str, Name] = Field({}, description="Test sets by name; the models are compared on each of them.")
    channel: Annotated[str, Field(pattern="^(error|mix|[0-9]+)$")] = Field(
        "error",
        description="How files with several channels are read: error refuses them, mix takes their mean, a number "
        "picks one, from 0.",
    )
    skip_bad: bool = Field(False, description="Leave faulty utterances out and count them, instead of stopping.")
    max_seconds: Positive | None = Field(
        None, description="Longest utterance to train on, seconds; longer ones are left out and counted."
    )


class FeaturesConfig(Section):
    """Log-mel features, normalised for each utterance."""

    sample_rate: Annotated[int, Field(ge=4000, le=192000)] = Field(
        16000, description="Sample rate, Hz; other audio is resampled to it."
    )
    n_mels: Whole = Field(80, description="Number of mel bands, up to half the sample rate.")
    window_ms: Positive = Field(25.0, description="Length of the analysis window, milliseconds.")
    hop_ms: Positive = Field(10.0, description="Step from one window to the next, milliseconds.")
    pitch: bool = Field(False, description="Add three pitch features (Ghahremani et al. 2014).")


class TokensConfig(Section):
    """The units that the model writes; their vocabulary is made from the training transcripts."""

    type: Literal["characters", "words", "bpe"] = Field(
        "characters", description="Kind of unit; bpe: word pieces of SentencePiece."
    )
    vocabulary_size: Whole | None = Field(None, description="Number of word pieces; for bpe alone.")


class ModelConfig(Section):
    """The hybrid CTC/attention Conformer of Li et al. 2023."""

    layers: Whole = Field(12, description="Number of Conformer blocks.")
    width: Whole = Field(256, description="Width of encoder and decoder: the numbers in a hidden vector.")
    heads: Whole = Field(4, description="Attention heads of each encoder block.")
    ffn_width: PerBlock = Field(
        2048, description="Hidden units of a block's first feed-forward module; a list has one number for each block."
    )
    ffn2_width: PerBlock | None = Field(
        None, description="Hidden units of a block's second feed-forward module; default: those of the first."
    )
    ffn_rank: Ranks = Field(
        0,
        description="Rank of the first module's matrices; 0: they are not factored; a list has one number for each "
        "block.",
    )
    ffn2_rank: Ranks | None = Field(
        None, description="Rank of the second module's matrices; default: that of the first."
    )
    kernel_size: Whole = Field(31, description="Kernel of the depthwise convolution, frames; an odd number.")
    subsampling: Literal["striding", "dw_striding"] = Field(
        "striding", description="Kind of the convolutions that shorten the input; dw_striding has fewer weights."
    )
    subsampling_factor: Whole = Field(4, description="Feature frames that become one encoder frame: 2, 4 or 8.")
    subsampling_channels: Whole | None = Field(
        None, description="Channels of the shortening convolutions; default: width."
    )
    subsampling_padding: Literal[0, 1] = Field(
        1, description="Padding of the shortening convolutions; 0: none, as in ESPnet."
    )
    conv_norm: Literal["batch_norm", "layer_norm"] = Field(
        "batch_norm", description="Normalisation in the convolution module."
    )
    dropout: Share = Field(0.1, description="Dropout rate in encoder and decoder.")
    decoder_layers: Count = Field(6, description="Layers of the Transformer decoder; 0: no decoder, CTC alone.")
    decoder_heads: Whole = Field(4, description="Attention heads of each decoder layer.")
    decoder_ffn_width: Whole = Field(2048, description="Hidden units of each decoder layer's feed-forward module.")


class DecodeConfig(Section):
    """The search for transcripts (`mpq evaluate --decode ...`)."""

    method: DecodeMethod = Field(
        "greedy", description="Greedy CTC, CTC prefix beam search, or joint CTC/attention beam search."
    )
    beam_size: Whole = Field(10, description="Hypotheses that a beam search keeps.")
    ctc_weight: Fraction = Field(0.3, description="Share of CTC in the scores of the joint search.")
    length_bonus: float = Field(0.0, description="Bonus for each token in the joint search, nats.")


class SensitivityConfig(Section):
    """Sensitivity of each layer at each bit-width (`mpq sensitivity`)."""

    rates: list[Annotated[float, Field(ge=0.1, le=8)]] | None = Field(
        None, description="Nominal rates to measure, bits a weight (scheme entropy); default: 12 from 0.6 to 6."
    )
    bits: list[Annotated[int, Field(ge=1, le=8)]] | None = Field(
        None, description="Bit-widths to measure, instead of rates; default of the other schemes: 2, 3, 4, 5, 6, 8."
    )
    method: ScoreMethod = Field(
        "fisher", description="Score: to second order, all layers at once (fisher), or exact, one layer at a time (kl)."
    )
    output: Output | None = Field(
        None,
        description="Output whose divergence is measured; default: decoder for a model that has one, otherwise ctc.",
    )
    seconds: Positive | None = Field(None, description="Seconds of audio; default: 300 (fisher), 60 (kl).")
    vary: bool | None = Field(
        None,
        description="Half of the audio cut into pieces, half of these at half the bandwidth; default: for entropy.",
    )
    scheme: SchemeName | None = Field(
        None,
        description="Kind of the levels; default: entropy, or asymmetric where bits, granularity or clip are given.",
    )
    granularity: Annotated[str, Field(pattern="^(tensor|channel|group:[1-9][0-9]*)$")] | None = Field(
        None, description="Weights that share a scale; default: group:64 (entropy: tensor)."
    )
    clip: Annotated[str, Field(pattern="^(none|mse|mae|percentile:[0-9.]+)$")] | None = Field(
        None, description="Choice of the range that the levels span; default: mse (entropy: none)."
    )
    rounding: RoundingName | None = Field(
        None, description="Rounding of weights to levels; default: gptq, for mulaw nearest."
    )


class AllocateConfig(Section):
    """Bit-widths under exactly one of the first four keys (`mpq allocate`)."""

    target_mb: Positive | None = Field(None, description="Largest size of the packed file, MB of 2^20 bytes.")
    target_ratio: Positive | None = Field(
        None, description="How many times smaller than float32 the packed file is at least."
    )
    average_bits: Positive | None = Field(None, description="Largest average of code bits a weight.")
    max_divergence: Positive | None = Field(
        None, description="Largest divergence of the output; the smallest file that keeps it is taken."
    )
    keep: dict[str, Annotated[int | float, Field(gt=0)]] = Field(
        {}, description="Floors, {pattern of layer names: fewest bits}."
    )
    exclude: list[str] = Field([], description="Patterns of layer names that stay unquantized.")
    tie: list[str] = Field([], description="Patterns of layer names that share one bit-width.")


class CompareConfig(Section):
    """Tests against the float model (`mpq compare`)."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="Significance level of the tests.")


class Recipe(Section):
    """A whole recipe. Sections and keys that are left out have their defaults."""

    stages: list[Stage] = Field(
        [stage for stage in STAGES if stage not in ("search", "finetune")],
        description="Stages that `mpq run` does, in this order.",
    )
    seed: Seed = Field(0, description="Seed of everything that is drawn at random.")
    checkpoint: Name | None = Field(None, description="Trained model, for a recipe without the stage train.")
    data: DataConfig = DataConfig()
    features: FeaturesConfig = FeaturesConfig()
    tokens: TokensConfig = TokensConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    search: SearchConfig = SearchConfig()
    decode: DecodeConfig = DecodeConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    allocate: AllocateConfig = AllocateConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    finetune_augment: FinetuneAugmentConfig = FinetuneAugmentConfig()
    compare: CompareConfig = CompareConfig()

    def path(self, name: str) -> Path:
        """Returns the path of data that this recipe names, from the recipe's folder on."""
        return Path(self.data.root) / name

    def calibration(self) -> str:
        """Returns the name of the audio for sensitivities and for statistics of a trained model."""
        return self.data.calibration or self.data.train[0]


def sections() -> dict[str, type[BaseModel]]:
    """Returns the sections of a recipe by name."""
    return {
        key: field.annotation
        for key, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
