"""Training a hybrid CTC/attention Conformer from a recipe (`mpq train`).

A checkpoint folder holds `model.safetensors` (there when the training is complete), `recipe.json` (what was trained,
all defaults written out), `log.jsonl` (a line for each update and each epoch) and `training.json` (the result). While
the training runs, `state.pt` is where it goes on after an interruption, and `epochs/` has what may be averaged.

Interrupt it anywhere (`mpq.training_loop`): the losses are the same. They are sums over the whole batch divided by its
tokens, and batch normalisation sees the whole batch, so they do not depend on the number of processes either (but for
dropout, which each process draws for itself).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import write_json
from mpq.held_out import held_out_errors
from mpq.losses import JointLoss
from mpq.models.building import build_model
from mpq.models.checkpoint import MODEL_FILE, write_checkpoint
from mpq.optimization import make_optimizer
from mpq.orthogonal import constrained_factors, semi_orthogonal_step
from mpq.runtime import choose_device, processes
from mpq.text import train_tokenizer
from mpq.training_data import TrainingSet, read_set, read_transcripts
from mpq.training_folder import check_folder, claim_folder, clean_up, training_fingerprint
from mpq.training_loop import Batch, Job, TrainingLoop
from mpq.training_record import TrainingResult, average_weights


def train(recipe: Recipe, out: Path, *, device: str = "auto", quiet: bool = False) -> TrainingResult:
    """Trains the model of a recipe and writes the checkpoint folder `out`; an interrupted training goes on.

    Args:
        recipe: As `load_recipe` returned it.
        out: The folder.
        device: As in `mpq.runtime.choose_device`.
        quiet: Show no progress.

    Raises:
        MpqError: Bad data; a folder that holds another training; a loss that is not finite, with the batch.
    """
    where = choose_device(device)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MpqError(f"{out}: the folder cannot be made: {error.strerror}") from None
    tokenizer = train_tokenizer(recipe.tokens.type, read_transcripts(recipe.data), recipe.tokens.vocabulary_size)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer).to(where)
    fastest = max(recipe.augment.speed)
    data = read_set(recipe.data.train, recipe.data, model, fastest, is_training=True)
    dev = read_set([recipe.data.dev], recipe.data, model, 1.0, is_training=False) if recipe.data.dev else None
    fingerprint = training_fingerprint(recipe, data, dev)
    check_folder(Path(out), fingerprint)
    with processes(where) as workers:
        if (Path(out) / "training.json").exists() and (Path(out) / MODEL_FILE).exists():
            if workers.rank == 0:
                clean_up(Path(out))  # in case the training was killed before it did so
            return TrainingResult.load(Path(out) / "training.json")
        job = Job(
            model=model,
            data=data,
            options=recipe.train,
            augment=recipe.augment,
            channel=recipe.data.channel,
            seed=recipe.seed,
            out=Path(out),
            fingerprint=fingerprint,
            workers=workers,
            quiet=quiet,
        )
        return _Trainer(job, recipe, dev).train()


class _Trainer(TrainingLoop):
    """The training of a recipe: joint loss, semi-orthogonal factors, the model in training mode."""

    def __init__(self, job: Job, recipe: Recipe, dev: TrainingSet | None) -> None:
        self.recipe, self.train_options, self.dev = recipe, recipe.train, dev
        loss = JointLoss(job.model, recipe.train.label_smoothing)
        optimizer = make_optimizer(job.model, recipe.train.weight_decay, recipe.train.betas)
        super().__init__(job, loss, optimizer, ("ctc", "attention") if job.model.decoder else ("ctc",))
        self.factors = constrained_factors(job.model.encoder, recipe.train.semi_orthogonal)

    def train(self) -> TrainingResult:
        """Trains what is left and writes the model."""
        self.run()
        return self._finish()

    def begin(self) -> None:
        if self.is_chief:
            claim_folder(self.out, self.job.fingerprint)
            write_json(self.out / "recipe.json", self.recipe.model_dump())

    def prepare_update(self) -> None:
        self.model.train()

    def passes(self) -> int:
        return 1

    def losses(self, batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ctc, attention = self.loss(batch.features, batch.frames, batch.targets)
        counts = [len(self.data.tokens[index]) for index in batch.update_indices]
        sums = torch.stack([ctc.sum() / max(1, sum(counts)), attention.sum() / (sum(counts) + len(counts))])
        weight = self.train_options.ctc_weight
        return weight * sums[0] + (1 - weight) * sums[1], sums[: len(self.logged)], ctc + attention

    def total(self, values: dict[str, float]) -> float:
        weight = self.train_options.ctc_weight
        return weight * values["ctc"] + (1 - weight) * values.get("attention", 0.0)

    def finish_update(self) -> None:
        if self.factors and (self.step + 1) % self.train_options.semi_orthogonal_every == 0:
            for factor in self.factors:
                semi_orthogonal_step(factor)

    def blame(self, batch: Batch | None) -> str:
        return ""

    def evaluate(self) -> tuple[float | None, float | None]:
        """Returns the loss (nats a token) and WER of dev; None without one."""
        if self.dev is None:
            return None, None
        loss = JointLoss(self.model, self.train_options.label_smoothing)
        return held_out_errors(loss, self.dev, self.train_options.ctc_weight, self.job.channel, self.workers)

    def write_candidate(self, path: Path) -> None:
        write_checkpoint(path, self.model)

    def state(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)

    def _finish(self) -> TrainingResult:
        """Writes the model: the average of the best epochs, or the best one where that is better on dev."""
        ranked = self.candidates()
        choices = [ranked] if len(ranked) == 1 or self.dev is None else [ranked, ranked[:1]]
        results = []
        for epochs in choices:
            self.model.load_state_dict(average_weights([self.candidate_path(epoch) for epoch in epochs]), strict=False)
            loss, wer = self.evaluate()
            results.append(((loss if self.options.select == "loss" else wer) or 0.0, loss, wer, epochs))
        _, loss, wer, epochs = min(results, key=lambda one: one[0])
        if epochs is not choices[-1]:
            self.model.load_state_dict(average_weights([self.candidate_path(epoch) for epoch in epochs]), strict=False)
        result = TrainingResult(
            fingerprint=self.job.fingerprint,
            epochs=tuple(self.epochs),
            averaged=tuple(sorted(epochs)),
            dev_loss=loss,
            dev_wer=wer,
            parameters=self.model.parameter_counts(),
            utterances=len(self.data.utterances),
            hours=sum(self.data.durations) / 3600,
            skipped=self.data.skipped,
            too_long=self.data.too_long,
            seconds=self.seconds,
            device=str(self.device),
            processes=self.workers.count,
        )
        if self.is_chief:
            write_checkpoint(self.out / MODEL_FILE, self.model)
            write_json(self.out / "training.json", result.to_json())
            clean_up(self.out)
        self.workers.barrier()
        return result
