"""Recipes: a TOML file that says all of a model, its training and its compression.

The classes below are the schema, the defaults and the documentation (`docs/recipes.md` is made from them) at once.
`mpq.pipeline.read` reads the files. Relative paths start at the folder of the recipe.
"""

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from mpq.quantization.spec import RoundingName, SchemeName

STAGES = ("train", "search", "evaluate", "sensitivity", "allocate", "pack", "finetune", "compare")
"""All stages that a recipe may name, in the order in which they run."""

SYNTHETIC_NOISE = ("white", "babble")

Whole = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
PerBlock = Whole | list[Whole]
Candidates = list[Whole] | list[list[Whole]]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which audio and transcripts: manifests (JSON lines) or Kaldi data directories."""

    root: str = Field("", description="Folder that the paths below start at, itself relative to the recipe.")
    train: list[Name] = Field([], description="Data to train on; the first is also what the layers are calibrated on.")
    dev: Name | None = Field(None, description="Held-out data: decides when to stop and which epochs are averaged.")
    calibration: Name | None = Field(None, description="Audio for sensitivity and rounding, instead of train's.")
    test: dict[str, Name] = Field({}, description="Test sets by name; each is compared.")
    channel: Annotated[str, Field(pattern="^(error|mix|[0-9]+)$")] = Field(
        "error", description="Of files with several: error, mix (their mean), or a number from 0."
    )
    skip_bad: bool = Field(False, description="Leave faulty utterances out, and count them.")
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Leave longer utterances out of training, and count them."
    )


class FeaturesConfig(_Section):
    """Log-mel features, normalised for each utterance."""

    sample_rate: Annotated[int, Field(ge=4000, le=192000)] = Field(16000, description="Hz; other audio is resampled.")
    n_mels: Whole = Field(80, description="Mel bands up to half the sample rate.")
    window_ms: Annotated[float, Field(gt=0)] = Field(25.0, description="Window, milliseconds.")
    hop_ms: Annotated[float, Field(gt=0)] = Field(10.0, description="Step, milliseconds.")
    pitch: bool = Field(False, description="Add three pitch features (Ghahremani et al. 2014).")


class TokensConfig(_Section):
    """What the model writes; the vocabulary is made from the training transcripts."""

    type: Literal["characters", "words", "bpe"] = Field("characters", description="bpe: SentencePiece.")
    vocabulary_size: Whole | None = Field(None, description="Number of pieces, for bpe alone.")


class ModelConfig(_Section):
    """The hybrid CTC/attention Conformer of Li et al. 2023."""

    layers: Whole = Field(12, description="Conformer blocks.")
    width: Whole = Field(256, description="Of the encoder (and decoder): numbers in a frame's hidden vector.")
    heads: Whole = Field(4, description="Attention heads.")
    ffn_width: PerBlock = Field(2048, description="Hidden units of the first feed-forward module; a list: per block.")
    ffn2_width: PerBlock | None = Field(None, description="Of the second module; default: as the first.")
    ffn_rank: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] = Field(
        0, description="Rank of the factored matrices of the first module; 0: not factored; a list: per block."
    )
    ffn2_rank: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Of the second module; default: as the first."
    )
    kernel_size: Whole = Field(31, description="Of the depthwise convolution; odd.")
    subsampling: Literal["striding", "dw_striding"] = Field("striding", description="dw_striding: fewer weights.")
    subsampling_factor: Whole = Field(4, description="Feature frames for an encoder frame: 2, 4, 8.")
    subsampling_channels: Whole | None = Field(None, description="Default: width.")
    subsampling_padding: Literal[0, 1] = Field(1, description="0: unpadded, as in ESPnet.")
    conv_norm: Literal["batch_norm", "layer_norm"] = Field("batch_norm", description="In the convolution module.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="In encoder and decoder.")
    decoder_layers: Annotated[int, Field(ge=0)] = Field(6, description="Of the Transformer decoder; 0: CTC alone.")
    decoder_heads: Whole = Field(4, description="Attention heads of the decoder.")
    decoder_ffn_width: Whole = Field(2048, description="Hidden units of the decoder's feed-forward modules.")


class LoopConfig(_Section):
    """What every training loop needs (`mpq.training.loop`)."""

    epochs: Whole = Field(50, description="Passes over the training data.")
    batch_frames: Whole = Field(20000, description="Feature frames in a batch, padding counted, over all processes.")
    accumulate: Whole = Field(1, description="Batches for one update of the weights.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="The highest, at the end of the warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(2000, description="Updates in which the rate rises from 0.")
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = Field(
        "inverse_sqrt", description="After the warm-up; cosine and linear end at about 0 with the last epoch."
    )
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.98), description="Of Adam(W).")
    clip_norm: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest norm of the gradient.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: mixed precision on CUDA (bfloat16 where the device has it), float32 on the CPU."
    )
    average: Whole = Field(5, description="Epochs whose weights are averaged in the end.")
    select: Literal["wer", "loss", "last"] = Field("wer", description="Which epochs: lowest dev WER or loss, or last.")
    patience: Whole | None = Field(None, description="Stop after so many epochs without a new best one.")
    save_minutes: Annotated[float, Field(gt=0)] = Field(10.0, description="Between saved states inside an epoch.")
    workers: Annotated[int, Field(ge=0)] = Field(
        1, description="Processes that read and augment audio; each keeps up to 512 MB of it."
    )
    tensorboard: bool = Field(False, description="Write TensorBoard logs too (needs the package tensorboard).")


class TrainConfig(LoopConfig):
    """Training (`mpq train`)."""

    ctc_weight: Fraction = Field(0.2, description="Share of the CTC loss (Li et al. 2023, Eq. 1); 1 without a decoder.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Of the attention loss.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="AdamW; of matrices and kernels alone.")
    semi_orthogonal: Annotated[str, Field(pattern="^[SL]{4}$")] = Field(
        "LLLL",
        description="S: semi-orthogonal, L: free; of the factors of the first matrix (inner, outer), of the second.",
    )
    semi_orthogonal_every: Whole = Field(4, description="Updates between two steps towards it.")


class AugmentConfig(_Section):
    """What is done to the training audio; drawn anew for each utterance and epoch."""

    speed: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(
        [1.0], description="Factors, of two decimals at most; one is drawn."
    )
    noise: list[Name] = Field(
        [], description='"white", "babble" (training utterances, reversed), or folders and files of recordings.'
    )
    noise_probability: Fraction = Field(0.5, description="Of adding one of them.")
    snr_db: tuple[float, float] = Field((0.0, 20.0), description="Range of the signal-to-noise ratio.")
    level_db: tuple[float, float] = Field((0.0, 0.0), description="Range of a change of level, after the noise.")
    frequency_masks: Annotated[int, Field(ge=0)] = Field(2, description="SpecAugment (Park et al. 2019).")
    frequency_mask_width: Whole = Field(27, description="Widest, bands.")
    time_masks: Annotated[int, Field(ge=0)] = Field(2, description="SpecAugment.")
    time_mask_width: Whole = Field(40, description="Widest, feature frames.")
    time_mask_fraction: Fraction = Field(0.2, description="Widest, of the utterance.")


class SearchConfig(_Section):
    """Architecture search over the feed-forward modules of the encoder (`mpq search`)."""

    space: Literal["widths", "ranks", "both"] = Field(
        "widths", description="What is searched: hidden widths, ranks of factored matrices, or both."
    )
    ffn_width: Candidates | None = Field(
        None,
        description="Candidates for the first module's width; a list of lists: of each block. Default: 1024, 1152 ... "
        "4096 (with ranks: 1024, 1536 ... 4096); of a trained model a quarter of its width to all of it.",
    )
    ffn2_width: Candidates | None = Field(None, description="Of the second module; default: as the first.")
    ffn_rank: Candidates | None = Field(
        None,
        description="For the first module's rank. Default: 80, 100 ... 240 (with widths: 120, 160, 200, 240); of a "
        "trained model up to the rank that saves nothing.",
    )
    ffn2_rank: Candidates | None = Field(None, description="Of the second module; default: as the first.")
    eta: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Penalty on the expected parameters, nats a token for each million (Li et al. 2023, Eq. 4)."
    )
    target_millions: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Instead of eta: the parameters that the model may have, millions."
    )
    method: Literal["gumbel", "softmax"] = Field(
        "gumbel", description="softmax: the weights of plain DARTS, without noise and temperature."
    )
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 0.1), description="Of the Gumbel-softmax, first and last; falls geometrically."
    )
    noise_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="Of the choice's noise and batches, for several choices from one supernet; default: seed."
    )
    held_out: Name | None = Field(None, description="Data that the architecture is chosen on; default: data.dev.")
    epochs: Whole = Field(30, description="Of the choice: passes over the held-out data.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.2, description="Of the choice: of the architecture's logits (Adam)."
    )
    trained: bool = Field(
        False, description="mpq run: begin with the model of the stage train; else from scratch, or with checkpoint."
    )
    supernet: Name | None = Field(
        None, description="Folder of the supernet, which several searches may share; default: supernet in --out."
    )
    supernet_epochs: Whole | None = Field(
        None, description="Passes that train the supernet; default: train.epochs, a third of them from a checkpoint."
    )
    final_epochs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Passes that train the model found; default: half of train.epochs; 0: cut out, not trained."
    )
    final_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The highest in these; default: half of train.learning_rate."
    )
    loss: Literal["transcripts", "distillation"] | None = Field(
        None,
        description="distillation: the outputs of the trained model, as in [finetune]. Default: transcripts; for a "
        "checkpoint that mpq did not train, distillation.",
    )


class FinetuneConfig(LoopConfig):
    """Quantization-aware fine-tuning (`mpq finetune`)."""

    epochs: Whole = Field(4, description="Passes over the training data.")
    batch_frames: Whole = Field(2400, description="Feature frames in a batch, padding counted, over all processes.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.002, description="The highest; of the weights, in steps of their grid at the start."
    )
    scale_rate: Annotated[float, Field(ge=0)] = Field(0.001, description="Of learned scales, relative to themselves.")
    rest_rate: Annotated[float, Field(ge=0)] = Field(5e-5, description="Of biases, norms and unquantized weights.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="Updates in which the rates rise from 0.")
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = Field(
        "cosine", description="After the warm-up; cosine and linear end at about 0 with the last epoch."
    )
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.99), description="Of Adam.")
    average: Whole = Field(1, description="Epochs whose weights are averaged in the end.")
    select: Literal["wer", "loss", "last"] = Field(
        "loss", description="Which epochs: lowest dev divergence (loss), lowest WER, or last; epoch 0 is the start."
    )
    scales: Literal["learned", "recomputed", "frozen"] = Field(
        "learned", description="learned (LSQ), recomputed from the weights in each pass, or frozen; not of mulaw."
    )
    search_every: Whole = Field(
        50, description="Updates between two searches: for clip ratios (recomputed scales), for mu (mulaw)."
    )
    alpha: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (10.0, 500.0),
        description="Of mulaw (General Quantizer): sharpness of the assignment, first and last.",
    )
    anneal: tuple[Fraction, Fraction] = Field(
        (0.0, 0.8), description="From which to which part of all updates it rises; after that, weights are rounded."
    )
    bound: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Nats at which the distillation of one frame saturates; 0: it does not."
    )
    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        100.0, description="Of the relative squared error of the encoder's hidden states, beside the distillation."
    )
    transcript_weight: Fraction = Field(
        0.0, description="Share of the transcripts' loss; the rest is distillation. 0 needs no transcripts."
    )
    ctc_weight: Fraction = Field(0.3, description="Share of CTC in both losses; 1 without an attention decoder.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Of the transcripts' attention loss.")
    teacher_hears: Literal["clean", "masked"] = Field(
        "clean", description="With SpecAugment, whether the teacher gets the masks too."
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decay of the running average of all weights that is evaluated and kept; 0: none."
    )
    batch_norm: Literal["frozen", "updated"] = Field(
        "frozen", description="updated: batch statistics in training, which move the running ones along."
    )
    dropout: bool = Field(False, description="With the model's own rates; NeMo archives are read with none.")


class FinetuneAugmentConfig(AugmentConfig):
    """What is done to the audio of fine-tuning; drawn anew for each utterance and epoch."""

    frequency_masks: Annotated[int, Field(ge=0)] = Field(0, description="SpecAugment (Park et al. 2019).")
    time_masks: Annotated[int, Field(ge=0)] = Field(0, description="SpecAugment.")


class DecodeConfig(_Section):
    """How transcripts are found (`mpq evaluate --decode ...`)."""

    method: Literal["greedy", "prefix", "joint"] = Field(
        "greedy", description="greedy CTC, CTC prefix beam search, or joint CTC/attention beam search."
    )
    beam_size: Whole = Field(10, description="Hypotheses that are kept.")
    ctc_weight: Fraction = Field(0.3, description="Share of CTC in the joint search.")
    length_bonus: float = Field(0.0, description="Of the joint search; nats for each token.")


class SensitivityConfig(_Section):
    """`mpq sensitivity`."""

    bits: list[Annotated[int, Field(ge=1, le=8)]] = Field([2, 3, 4, 5, 6, 8], description="Widths to measure.")
    method: Literal["fisher", "kl"] = Field("fisher", description="kl: exact, one layer at a time.")
    output: Literal["ctc", "encoder", "decoder"] | None = Field(
        None, description="Whose divergence; default: decoder where there is one, else ctc."
    )
    seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="Of audio; default: 300 (fisher), 60 (kl).")
    scheme: SchemeName | None = Field(None, description="Default: asymmetric.")
    granularity: Annotated[str, Field(pattern="^(tensor|channel|group:[1-9][0-9]*)$")] | None = Field(
        None, description="Default: group:64."
    )
    clip: Annotated[str, Field(pattern="^(none|mse|mae|percentile:[0-9.]+)$")] | None = Field(
        None, description="Default: mse."
    )
    rounding: RoundingName | None = Field(None, description="Default: gptq; mulaw: nearest.")


class AllocateConfig(_Section):
    """`mpq allocate`: exactly one of the four budgets."""

    target_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="Size of the packed file, MB of 2^20.")
    target_ratio: Annotated[float, Field(gt=0)] | None = Field(None, description="Times smaller than float32.")
    average_bits: Annotated[float, Field(gt=0)] | None = Field(None, description="Average code bits of a weight.")
    max_divergence: Annotated[float, Field(gt=0)] | None = Field(None, description="The smallest file that keeps it.")
    keep: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="{pattern: at least so many bits}.")
    exclude: list[str] = Field([], description="Patterns of layers that stay unquantized.")
    tie: list[str] = Field([], description="Patterns of layers that share one width.")


class CompareConfig(_Section):
    """`mpq compare`."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="Level of the tests.")


class Recipe(_Section):
    """A recipe. Sections that are left out have their defaults."""

    stages: list[Literal[STAGES]] = Field(
        [stage for stage in STAGES if stage not in ("search", "finetune")],
        description="What `mpq run` does, in this order.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Of all that is drawn at random.")
    checkpoint: Name | None = Field(None, description="A trained model, where there is no stage train.")
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
        """Returns where a data path of this recipe leads, from the recipe's folder on."""
        return Path(self.data.root) / name


def sections() -> dict[str, type[BaseModel]]:
    """Returns the sections of a recipe by name."""
    return {
        key: field.annotation
        for key, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def describe() -> Iterable[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Yields (section, what it is, [(key, type, default, description)]) of the whole schema, for the documentation."""
    for name, section in ({"": Recipe} | sections()).items():
        yield name, (section.__doc__ or "").strip(), describe_section(section)


def describe_section(section: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Returns [(key, type, default, description)] of a section, or of the keys of a recipe that are in none."""
    return [
        (
            key,
            _type_name(field.annotation),
            _toml(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for key, field in section.model_fields.items()
        if section is not Recipe or key not in sections()
    ]


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " \\| ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " \\| ".join(_type_name(one) for one in arguments if one is not type(None))
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "table"
    return {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}[kind.__name__]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return ""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)
