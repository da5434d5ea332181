"""Training a hybrid CTC/attention Conformer from a recipe (`mpq train`).

A checkpoint folder holds `model.safetensors` (there when the training is complete), `recipe.json` (what was trained,
all defaults written out), `log.jsonl` (a line for each update and each epoch) and `training.json` (the result). While
the training runs, `state.pt` is where it goes on after an interruption, and `epochs/` has what may be averaged.

Interrupt it anywhere: the state is saved at the end of the update that is under way (SIGINT, SIGTERM), and after a kill
the last saved one is taken up. All random choices are keyed by seed, epoch, update and utterance, so the losses are the
same as without the interruption. Under `torchrun`, each process takes its share of every batch (PyTorch's
DistributedDataParallel); losses are sums over the whole batch divided by its tokens, and batch normalisation sees the
whole batch, so the losses do not depend on the number of processes either (but for dropout, which each process draws
for itself).

Legend: N utterances, S samples.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.augment import generator, spec_mask
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import atomic_path, write_json
from mpq.held_out import held_out_errors
from mpq.losses import JointLoss, Targets
from mpq.models.building import build_model
from mpq.models.checkpoint import MODEL_FILE, write_checkpoint
from mpq.models.hybrid import HybridConformer
from mpq.optimization import choose_precision, learning_rate, make_optimizer
from mpq.orthogonal import constrained_factors, semi_orthogonal_step
from mpq.runtime import Processes, choose_device, memory_for, processes, progress, stop_requests
from mpq.text import train_tokenizer
from mpq.training_data import BatchReader, TrainingSet, plan_epoch, read_set, read_transcripts
from mpq.training_folder import check_folder, claim_folder, clean_up, training_fingerprint
from mpq.training_log import TrainingLog
from mpq.training_record import EpochResult, TrainingResult, average_weights, rank_epochs


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
        return _Trainer(recipe, model, data, dev, Path(out), fingerprint, workers, quiet).run()


SMALLEST_SCALE = 2.0**-10
"""Of the loss in float16: a gradient that overflows even so is not finite for another reason."""


class _Trainer:
    """The loop. What it knows of its progress is `epoch` (under way, from 0), `batch` (next), `step` (finished)."""

    def __init__(
        self,
        recipe: Recipe,
        model: HybridConformer,
        data: TrainingSet,
        dev: TrainingSet | None,
        out: Path,
        fingerprint: str,
        workers: Processes,
        quiet: bool,
    ) -> None:
        self.recipe, self.options, self.model, self.data, self.dev = recipe, recipe.train, model, data, dev
        self.out, self.fingerprint, self.workers = out, fingerprint, workers
        self.is_chief = workers.rank == 0
        self.quiet = quiet or not self.is_chief
        self.device = next(model.parameters()).device
        self.precision, self.scaler = choose_precision(self.options.precision, self.device)
        self.optimizer = make_optimizer(model, self.options.weight_decay, self.options.betas)
        self.factors = constrained_factors(model.encoder, self.options.semi_orthogonal)
        self.loss: nn.Module = JointLoss(model, self.options.label_smoothing)
        self.reader = BatchReader(data, recipe.augment, model, recipe.data.channel, recipe.seed, self.options.workers)
        self.log = TrainingLog(self.out, self.options.epochs, self.is_chief, self.quiet, self.options.tensorboard)
        self.epoch, self.batch, self.step = 0, 0, 0
        self.epochs: list[EpochResult] = []
        self.losses: list[float] = []
        self.seconds = 0.0
        self.log_bytes = 0
        self.total_steps = self.options.epochs * self._steps(self._plan(0))

    def run(self) -> TrainingResult:
        self._resume()
        if self.workers.count > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.loss = nn.parallel.DistributedDataParallel(self.loss, device_ids=ids, broadcast_buffers=False)
        if self.is_chief and self.epoch == 0 and self.step == 0:
            claim_folder(self.out, self.fingerprint)
            write_json(self.out / "recipe.json", self.recipe.model_dump())
        with stop_requests() as stopped, self.log.opened(self.log_bytes, self.step):
            while self.epoch < self.options.epochs and not self._is_exhausted():
                self._train_epoch(stopped)
        return self._finish()

    # ---- one epoch

    def _plan(self, epoch: int) -> list[list[int]]:
        hop = self.model.featurizer.options.hop_length / self.model.sample_rate
        options = self.options
        slowest = [seconds / min(self.recipe.augment.speed) for seconds in self.data.durations]
        return plan_epoch(slowest, hop, options.batch_frames, self.recipe.seed, epoch, least=self.workers.count)

    def _steps(self, plan: Sequence[Sequence[int]]) -> int:
        return math.ceil(len(plan) / self.options.accumulate)

    def _train_epoch(self, stopped: Callable[[], bool]) -> None:
        start, before, saved = time.monotonic(), self.seconds, time.monotonic()
        plan = self._plan(self.epoch)
        if self.batch == 0:
            self.losses = []
        own = [batch[self.workers.rank :: self.workers.count] for batch in plan]
        ready = self.reader.read(self.epoch, own[self.batch :])
        with progress(f"epoch {self.epoch + 1}/{self.options.epochs}", len(plan), self.quiet, "batches") as advance:
            advance(self.batch)
            while self.batch < len(plan):
                group = range(self.batch, min(self.batch + self.options.accumulate, len(plan)))
                record, is_stopping = self._update(plan, own, group, ready, stopped)
                self.losses.append(record["loss"])
                self.step, self.batch = self.step + 1, group[-1] + 1
                self.seconds = before + time.monotonic() - start
                self.log_bytes = self.log.add_update(self.step, self.epoch + 1, record)
                advance(len(group))
                if is_stopping:
                    self._save()
                    self.workers.barrier()  # nobody leaves while the chief is still writing
                    raise KeyboardInterrupt
                if time.monotonic() - saved > 60 * self.options.save_minutes:
                    self._save()
                    saved = time.monotonic()
        self._save()  # so that a kill while the held-out data are scored costs no update
        loss, wer = self._evaluate()
        self.seconds = before + time.monotonic() - start
        done = EpochResult(
            epoch=self.epoch + 1,
            step=self.step,
            train_loss=math.fsum(self.losses) / len(self.losses),
            dev_loss=loss,
            dev_wer=wer,
            seconds=round(self.seconds - sum(one.seconds for one in self.epochs), 3),
        )
        self.epochs.append(done)
        self.log_bytes = self.log.add_epoch(done)
        candidates = self._write_candidate()
        self.epoch, self.batch = self.epoch + 1, 0
        self._save()
        if self.is_chief:  # not before the state knows the new epoch
            for path in (self.out / "epochs").glob("*.safetensors"):
                if int(path.stem) not in candidates:
                    path.unlink()

    def _update(
        self,
        plan: list[list[int]],
        own: list[list[int]],
        group: range,
        ready: Iterator[tuple[Tensor, Tensor, Targets]],
        stopped: Callable[[], bool],
    ) -> tuple[dict[str, float], bool]:
        """Returns the losses of one update of the weights, from the batches of a group, and whether to stop after it.

        A process that was asked to stop tells the others, so that all of them stop after the same update.
        """
        options = self.options
        rate = learning_rate(
            self.step + 1, self.total_steps, options.learning_rate, options.warmup_steps, options.schedule
        )
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        counts = [len(self.data.tokens[index]) for batch in group for index in plan[batch]]
        tokens, ends = max(1, sum(counts)), sum(counts) + len(counts)
        sums = torch.zeros(3, dtype=torch.float64)  # CTC loss, attention loss, requests to stop
        for batch in group:
            waveforms, lengths, targets = next(ready)
            names = [self.data.utterances[index] for index in own[batch]]
            what = f"epoch {self.epoch + 1}, update {self.step + 1}, batch of {len(names)} utterances"
            is_last = batch == group[-1]
            with (
                memory_for(f"{what} of up to {waveforms.shape[1] / self.model.sample_rate:.1f} s (lower batch_frames)"),
                nullcontext() if is_last or self.workers.count == 1 else self.loss.no_sync(),
            ):
                features, frames = self._features(waveforms, lengths, [item.utt_id for item in names])
                torch.manual_seed(self._draw(f"dropout {self.step} {batch} {self.workers.rank}"))
                with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                    ctc, attention = self.loss(features, frames, targets.to(self.device))
                weight = self.options.ctc_weight
                total = weight * ctc.sum() / tokens + (1 - weight) * attention.sum() / ends
                if not math.isfinite(float(total.detach())):
                    bad = [
                        item
                        for item, loss in zip(names, (ctc + attention).tolist(), strict=True)
                        if not math.isfinite(loss)
                    ]
                    raise MpqError(self._not_finite(what, bad or names))
                self.scaler.scale(total * self.workers.count).backward()
            sums[:2] += torch.stack([ctc.sum() / tokens, attention.sum() / ends]).detach().double().cpu()
        sums[2] = stopped()
        self.workers.add_up(sums)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm))
        if not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE):
            names = [self.data.utterances[index] for batch in group for index in plan[batch]]
            raise MpqError(self._not_finite(f"gradient of epoch {self.epoch + 1}, update {self.step + 1}", names))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.factors and (self.step + 1) % self.options.semi_orthogonal_every == 0:
            for factor in self.factors:
                semi_orthogonal_step(factor)
        ctc_loss, attention_loss, stops = sums.tolist()
        weight = self.options.ctc_weight
        record = {"loss": weight * ctc_loss + (1 - weight) * attention_loss, "ctc": ctc_loss}
        record |= {"attention": attention_loss} if self.model.decoder else {}
        record |= {"norm": norm} if math.isfinite(norm) else {}  # float16 overflows now and then: no update was made
        return record | {"rate": rate}, stops > 0

    def _features(self, waveforms: Tensor, lengths: Tensor, utt_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns the (N, T, F) features with SpecAugment's masks, and the (N,) valid frames."""
        with torch.no_grad():
            features, frames = self.model.features(waveforms.to(self.device), lengths.to(self.device))
            features = features[:, : int(frames.max())]
            masks, bands = torch.zeros(features.shape, dtype=torch.bool), self.model.featurizer.options.n_mels
            for row, count, utt_id in zip(masks, frames.tolist(), utt_ids, strict=True):
                random = generator(self.recipe.seed, self.epoch, utt_id, "mask")
                mask = spec_mask(count, bands, self.recipe.augment, random)
                row[:count, :bands] = mask
                row[:count, bands:] = mask.all(dim=1, keepdim=True)  # pitch has no bands: masked with whole frames
            return features.masked_fill(masks.to(self.device), 0.0), frames

    def _draw(self, what: str) -> int:
        return int(generator(self.recipe.seed, self.epoch, "", what).integers(2**62))

    def _not_finite(self, what: str, items: Sequence[Any]) -> str:
        listed = ", ".join(f'"{item.utt_id}" ({item.source})' for item in items[:5])
        more = f" and {len(items) - 5} more" if len(items) > 5 else ""
        return (
            f"{what}: the loss or its gradient is not finite; utterances {listed}{more}; look at this audio, or lower "
            f"train.learning_rate; {self.out} keeps the state before"
        )

    def _evaluate(self) -> tuple[float | None, float | None]:
        """Returns the loss (nats a token) and WER of dev; None without one."""
        if self.dev is None:
            return None, None
        loss = JointLoss(self.model, self.options.label_smoothing)
        return held_out_errors(loss, self.dev, self.options.ctc_weight, self.recipe.data.channel, self.workers)

    # ---- which epochs are good

    def _ranked(self) -> list[EpochResult]:
        return rank_epochs(self.epochs, self.options.select)

    def _is_exhausted(self) -> bool:
        if not self.options.patience or not self.epochs:
            return False
        return self.epochs[-1].epoch - self._ranked()[0].epoch >= self.options.patience

    def _epoch_path(self, epoch: int) -> Path:
        return self.out / "epochs" / f"{epoch:04}.safetensors"

    def _candidates(self) -> list[int]:
        """Returns the epochs that may be averaged, the best first."""
        return [one.epoch for one in self._ranked()[: self.options.average]]

    def _write_candidate(self) -> list[int]:
        """Writes the last epoch's weights if they may be averaged; returns which epochs may be."""
        best = self._candidates()
        if self.is_chief and self.epochs[-1].epoch in best:
            (self.out / "epochs").mkdir(exist_ok=True)
            write_checkpoint(self._epoch_path(self.epochs[-1].epoch), self.model)
        return best

    def _finish(self) -> TrainingResult:
        """Writes the model: the average of the best epochs, or the best one where that is better on dev."""
        self.workers.barrier()  # the chief has written the last candidate
        ranked = self._candidates()
        choices = [ranked] if len(ranked) == 1 or self.dev is None else [ranked, ranked[:1]]
        results = []
        for epochs in choices:
            self.model.load_state_dict(average_weights([self._epoch_path(epoch) for epoch in epochs]), strict=False)
            loss, wer = self._evaluate()
            results.append(((loss if self.options.select == "loss" else wer) or 0.0, loss, wer, epochs))
        _, loss, wer, epochs = min(results, key=lambda one: one[0])
        if epochs is not choices[-1]:
            self.model.load_state_dict(average_weights([self._epoch_path(epoch) for epoch in epochs]), strict=False)
        result = TrainingResult(
            fingerprint=self.fingerprint,
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

    # ---- state, log, words

    def _save(self) -> None:
        if not self.is_chief:
            return
        state = {
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "processes": self.workers.count,
            "losses": self.losses,
            "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "epochs": [asdict(one) for one in self.epochs],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_path(self.out / "state.pt") as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if path.exists():
            try:
                state = torch.load(path, weights_only=True, map_location=self.device)
            except Exception as error:  # whatever torch finds wrong with the file
                raise MpqError(f"{path}: cannot be read ({error}); delete the folder to begin anew") from None
            self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
            if self.batch and state["processes"] != self.workers.count:
                raise MpqError(
                    f"{self.out}: was cut off inside an epoch that {state['processes']} processes share; go on with "
                    f"as many, not with {self.workers.count}, until its end"
                )
            self.losses, self.seconds, self.log_bytes = state["losses"], state["seconds"], state["log_bytes"]
            self.epochs = [EpochResult(**one) for one in state["epochs"]]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if not self.quiet:
                print(f"train: goes on after update {self.step}, epoch {self.epoch + 1}", file=sys.stderr, flush=True)
        self.workers.barrier()
