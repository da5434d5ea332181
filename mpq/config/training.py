"""The sections of a recipe that describe training loops: train, augment, search, finetune."""

from typing import Annotated, Literal

from pydantic import Field

from mpq.config.types import Candidates, Count, Fraction, Name, NonNegative, Positive, Section, Seed, Share, Whole

SYNTHETIC_NOISE = ("white", "babble")
"""Noises that are made, not read from files."""


class LoopConfig(Section):
    """Options of every training loop (`mpq.training.loop`)."""

    epochs: Whole = Field(50, description="Passes over the training data.")
    batch_frames: Whole = Field(
        20000, description="Feature frames in a batch, padding included, summed over all processes."
    )
    accumulate: Whole = Field(1, description="Batches whose gradients are added up for one update of the weights.")
    learning_rate: Positive = Field(1e-3, description="Highest learning rate, reached at the end of the warm-up.")
    warmup_steps: Count = Field(2000, description="Updates in which the learning rate rises from 0.")
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = Field(
        "inverse_sqrt",
        description="Learning rate after the warm-up; cosine and linear end at about 0 with the last epoch.",
    )
    betas: tuple[Share, Share] = Field(
        (0.9, 0.98), description="Decay rates of Adam's running means: of the gradient, and of its square."
    )
    clip_norm: Positive = Field(5.0, description="Largest norm of the gradient; a larger one is scaled down to it.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic; auto: mixed precision on CUDA (bfloat16 where the device has it), float32 on the CPU.",
    )
    average: Whole = Field(5, description="Number of epochs whose weights are averaged in the end.")
    select: Literal["wer", "loss", "last"] = Field(
        "wer", description="Epochs that count as best: of lowest dev WER, of lowest dev loss, or the last."
    )
    patience: Whole | None = Field(
        None, description="Number of epochs without a new best one after which training stops."
    )
    save_minutes: Positive = Field(10.0, description="Minutes between saved states inside an epoch.")
    workers: Count = Field(
        1,
        description="Processes that read and augment audio, one for each core at most; each keeps up to 512 MB of it.",
    )
    tensorboard: bool = Field(False, description="Write TensorBoard logs too (needs the package tensorboard).")


class TrainConfig(LoopConfig):
    """Training of a float model (`mpq train`)."""

    ctc_weight: Fraction = Field(
        0.2, description="Share of CTC in the loss (Li et al. 2023, Eq. 1); 1 for a model without a decoder."
    )
    label_smoothing: Share = Field(0.1, description="Label smoothing of the attention loss.")
    weight_decay: NonNegative = Field(1e-2, description="Weight decay (AdamW), applied to matrices and kernels alone.")
    semi_orthogonal: Annotated[str, Field(pattern="^[SL]{4}$")] = Field(
        "LLLL",
        description="Four letters, S (semi-orthogonal) or L (free): for the inner and outer factor of a module's "
        "first matrix, then of its second.",
    )
    semi_orthogonal_every: Whole = Field(
        4, description="Updates between two steps that make the factors more semi-orthogonal."
    )


class AugmentConfig(Section):
    """Changes to the training audio, drawn anew for each utterance and epoch."""

    speed: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(
        [1.0], description="Speed factors, with two decimals at most; one is drawn for each utterance."
    )
    noise: list[Name] = Field(
        [], description='Noises: "white", "babble" (reversed training utterances), or folders and files of recordings.'
    )
    noise_probability: Fraction = Field(0.5, description="Probability that an utterance gets a noise.")
    snr_db: tuple[float, float] = Field((0.0, 20.0), description="Range of the signal-to-noise ratio, dB.")
    level_db: tuple[float, float] = Field((0.0, 0.0), description="Range of the change of level after the noise, dB.")
    frequency_masks: Count = Field(2, description="Number of frequency masks (SpecAugment, Park et al. 2019).")
    frequency_mask_width: Whole = Field(27, description="Width of the widest frequency mask, mel bands.")
    time_masks: Count = Field(2, description="Number of time masks (SpecAugment).")
    time_mask_width: Whole = Field(40, description="Length of the longest time mask, feature frames.")
    time_mask_fraction: Fraction = Field(
        0.2, description="Length of the longest time mask, as a fraction of the utterance."
    )


class SearchConfig(Section):
    """Architecture search over the feed-forward modules of the encoder (`mpq search`)."""

    space: Literal["widths", "ranks", "both"] = Field(
        "widths", description="Quantities to search: hidden widths, ranks of factored matrices, or both."
    )
    ffn_width: Candidates | None = Field(
        None,
        description="Candidates for the width of the first feed-forward module; a list of lists has one list for "
        "each block. Default: 1024, 1152 ... 4096 (with ranks: 1024, 1536 ... 4096); for a trained "
        "model, a quarter of its width to all of it.",
    )
    ffn2_width: Candidates | None = Field(
        None, description="Candidates for the width of the second feed-forward module; default: those of the first."
    )
    ffn_rank: Candidates | None = Field(
        None,
        description="Candidates for the rank of the first module's matrices. Default: 80, 100 ... 240 (with widths: "
        "120, 160, 200, 240); for a trained model, up to the rank that saves nothing.",
    )
    ffn2_rank: Candidates | None = Field(
        None, description="Candidates for the rank of the second module's matrices; default: those of the first."
    )
    eta: NonNegative | None = Field(
        None, description="Penalty on the expected parameters, nats a token for each million (Li et al. 2023, Eq. 4)."
    )
    target_millions: Positive | None = Field(
        None, description="Largest number of parameters, millions; takes the place of eta."
    )
    method: Literal["gumbel", "softmax"] = Field(
        "gumbel",
        description="Weights of the candidates: Gumbel-softmax, or plain DARTS's softmax, without noise and "
        "temperature.",
    )
    temperature: tuple[Positive, Positive] = Field(
        (1.0, 0.1), description="First and last temperature of the Gumbel-softmax; it falls geometrically."
    )
    noise_seed: Seed | None = Field(
        None,
        description="Seed of the choice's noise and batches, for several choices from one supernet; default: seed.",
    )
    held_out: Name | None = Field(None, description="Data that the architecture is chosen on; default: data.dev.")
    epochs: Whole = Field(30, description="Passes over the held-out data while the architecture is chosen.")
    learning_rate: Positive = Field(
        0.2, description="Learning rate of the architecture's logits while the architecture is chosen (Adam)."
    )
    trained: bool = Field(
        False,
        description="Begin with the model of the stage train of `mpq run`, instead of from scratch or with checkpoint.",
    )
    supernet: Name | None = Field(
        None, description="Folder of the supernet, which several searches may share; default: supernet in --out."
    )
    supernet_epochs: Whole | None = Field(
        None, description="Passes that train the supernet; default: train.epochs, or a third of them from a checkpoint."
    )
    final_epochs: Count | None = Field(
        None, description="Passes that train the model found; default: half of train.epochs; 0: it stays untrained."
    )
    final_learning_rate: Positive | None = Field(
        None, description="Highest learning rate of these last passes; default: half of train.learning_rate."
    )
    loss: Literal["transcripts", "distillation"] | None = Field(
        None,
        description="Source of the loss: transcripts, or the outputs of the trained model (distillation, as in "
        "[finetune]). Default: transcripts; for a checkpoint that mpq did not train, distillation.",
    )


class FinetuneConfig(LoopConfig):
    """Quantization-aware fine-tuning (`mpq finetune`)."""

    epochs: Whole = Field(4, description="Passes over the training data.")
    batch_frames: Whole = Field(
        2400, description="Feature frames in a batch, padding included, summed over all processes."
    )
    learning_rate: Positive = Field(
        0.002, description="Highest learning rate of the weights, in steps of the grid that each has at the start."
    )
    scale_rate: NonNegative = Field(0.001, description="Learning rate of learned scales, relative to the scale itself.")
    rest_rate: NonNegative = Field(5e-5, description="Learning rate of biases, norms and unquantized weights.")
    warmup_steps: Count = Field(20, description="Updates in which the learning rates rise from 0.")
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rates after the warm-up; cosine and linear end at about 0 with the last epoch."
    )
    betas: tuple[Share, Share] = Field(
        (0.9, 0.99), description="Decay rates of Adam's running means: of the gradient, and of its square."
    )
    average: Whole = Field(1, description="Number of epochs whose weights are averaged in the end.")
    select: Literal["wer", "loss", "last"] = Field(
        "loss",
        description="Epochs that count as best: of lowest dev divergence (loss), of lowest dev WER, or the last; "
        "epoch 0 is the start.",
    )
    scales: Literal["learned", "recomputed", "frozen"] = Field(
        "learned",
        description="Scales, but for mulaw: learned (LSQ), recomputed from the weights in each pass (not for entropy), "
        "or frozen.",
    )
    rate_weight: NonNegative = Field(
        0.0,
        description="Weight, in the loss, of the estimated bits a weight of the scheme entropy; without it, larger "
        "steps alone keep the size.",
    )
    search_every: Whole = Field(
        50, description="Updates between two searches: for clip ratios (recomputed scales), for mu (mulaw)."
    )
    alpha: tuple[Positive, Positive] = Field(
        (10.0, 500.0), description="First and last sharpness of the soft assignment of mulaw (General Quantizer)."
    )
    anneal: tuple[Fraction, Fraction] = Field(
        (0.0, 0.8),
        description="Fractions of all updates between which alpha rises; after the second one, weights are rounded.",
    )
    bound: NonNegative = Field(
        1.0, description="Nats at which the distillation loss of one frame saturates; 0: it does not saturate."
    )
    hidden_weight: NonNegative = Field(
        100.0,
        description="Weight of the relative squared error of the encoder's hidden states in the distillation loss.",
    )
    transcript_weight: Fraction = Field(
        0.0, description="Share of the transcripts' loss; the rest is distillation. 0 needs no transcripts."
    )
    ctc_weight: Fraction = Field(
        0.3, description="Share of CTC in both losses; 1 for a model without an attention decoder."
    )
    label_smoothing: Share = Field(0.0, description="Label smoothing of the transcripts' attention loss.")
    teacher_hears: Literal["clean", "masked"] = Field(
        "clean", description="Features that the teacher gets with SpecAugment: clean, or masked as the student's are."
    )
    ema: Share = Field(
        0.0, description="Decay of the running average of all weights that is evaluated and kept; 0: no average."
    )
    batch_norm: Literal["frozen", "updated"] = Field(
        "frozen",
        description="BatchNorm's statistics: frozen, or updated (those of the batch; the running ones follow).",
    )
    dropout: bool = Field(
        False, description="Use the model's own dropout rates; NeMo archives are read with rates of 0."
    )


class FinetuneAugmentConfig(AugmentConfig):
    """Changes to the audio of fine-tuning, drawn anew for each utterance and epoch."""

    frequency_masks: Count = Field(0, description="Number of frequency masks (SpecAugment, Park et al. 2019).")
    time_masks: Count = Field(0, description="Number of time masks (SpecAugment).")
