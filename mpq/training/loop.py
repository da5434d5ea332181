"""The loop that every training shares: epochs of updates that can be interrupted anywhere, resumed, and shared out.

The state is saved at the end of the update that is under way (SIGINT, SIGTERM), and after a kill the last saved one is
taken up. All random choices are keyed by seed, epoch, update and utterance, so the losses are the same as without the
interruption. Under `torchrun`, each process takes its share of every batch (PyTorch's DistributedDataParallel).

What is trained, and what it costs, is the business of the subclasses: `mpq.training.weights`, `mpq.search.loop` and
`mpq.finetuning.loop`.

Legend: N utterances, S samples, T feature frames, F features.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.config import AugmentConfig, LoopConfig
from mpq.errors import MpqError
from mpq.files import atomic_path
from mpq.models.base import AsrModel
from mpq.progress import progress
from mpq.runtime import Processes, keep_freed_memory, memory_for, stop_requests
from mpq.speech.augment import generator, spec_mask
from mpq.speech.manifests import Utterance
from mpq.training.data import BatchReader, TrainingSet, plan_epoch
from mpq.training.log import TrainingLog
from mpq.training.losses import Targets
from mpq.training.optimization import choose_precision, learning_rate
from mpq.training.record import EpochResult, rank_epochs

_log = logging.getLogger(__name__)

SMALLEST_SCALE = 2.0**-10
"""Of the loss in float16: a gradient that overflows even so is not finite for another reason."""


class NotFiniteError(MpqError):
    """A loss or gradient that is not finite: the training cannot go on."""


@dataclass(frozen=True)
class Job:
    """What a loop works on, and where.

    Attributes:
        model: Takes the features in; says sample rate, frames and where the work runs.
        data: To train on.
        options: Of the loop.
        augment: Of the audio.
        channel: As in `mpq.speech.audio.read_audio`.
        seed: Of all random choices.
        out: The folder.
        fingerprint: Of all that the weights depend on.
        workers: The processes.
        quiet: Show no progress.
    """

    model: AsrModel
    data: TrainingSet
    options: LoopConfig
    augment: AugmentConfig
    channel: str
    seed: int
    out: Path
    fingerprint: str
    workers: Processes
    quiet: bool


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch.

    Attributes:
        features, frames: (N, T, F) with SpecAugment's masks, and (N,) valid frames.
        clean: (N, T, F) without the masks.
        targets: The transcripts' tokens.
        items: The utterances.
        all_indices: Those of the whole batch, of every process, as indices into the data.
        update_indices: Those of all batches of the update.
        of: How many batches the update has.
    """

    features: Tensor
    frames: Tensor
    clean: Tensor
    targets: Targets
    items: Sequence[Utterance]
    all_indices: Sequence[int]
    update_indices: Sequence[int]
    of: int


class TrainingLoop(ABC):
    """The loop. What it knows of its progress is `epoch` (under way, from 0), `batch` (next), `step` (finished).

    Args:
        job: What to work on.
        loss: The module whose forward pass gives the loss; its parameters are what is trained.
        optimizer: Its parameter groups may have a "share" of the learning rate (1 without).
        logged: Names of the values that `losses` returns beside the loss.
    """

    def __init__(self, job: Job, loss: nn.Module, optimizer: torch.optim.Optimizer, logged: Sequence[str]) -> None:
        self.job, self.options, self.model, self.data = job, job.options, job.model, job.data
        self.out, self.workers = job.out, job.workers
        self.is_chief = job.workers.rank == 0
        self.quiet = job.quiet or not self.is_chief
        self.device = next(job.model.parameters()).device
        self.precision, self.scaler = choose_precision(job.options.precision, self.device)
        self.loss, self.optimizer, self.logged = loss, optimizer, tuple(logged)
        self.reader = BatchReader(job.data, job.augment, job.model, job.channel, job.seed, job.options.workers)
        self.log = TrainingLog(self.out, self.options.epochs, self.is_chief, self.quiet, self.options.tensorboard)
        self.epoch, self.batch, self.step = 0, 0, 0
        self.epochs: list[EpochResult] = []
        self.totals: list[float] = []
        self.seconds = 0.0
        self.log_bytes = 0
        self.total_steps = self.options.epochs * self._steps(self._plan(0))

    # ---- what the subclasses say

    @abstractmethod
    def begin(self) -> None:
        """Called before the first update: the first process puts on record whose training it is."""

    @abstractmethod
    def prepare_update(self) -> None:
        """Called before each update: training mode, schedules."""

    @abstractmethod
    def passes(self) -> int:
        """Returns how many losses are computed on each batch of the coming update; their gradients add up."""

    @abstractmethod
    def losses(self, batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss of pass `index` on a batch: this process's share of it, values to log, and by utterance.

        Returns:
            The loss to go down, a share such that all processes' add up to the whole; (len(logged),) values that add
            up in the same way over processes, batches and passes; (N,) losses by which a fault can be told.
        """

    @abstractmethod
    def total(self, values: dict[str, float]) -> float:
        """Returns the loss that the logged values of an update make up."""

    @abstractmethod
    def finish_update(self) -> None:
        """Called after each update of the weights."""

    @abstractmethod
    def blame(self, batch: Batch | None) -> str:
        """Returns what is known of where a loss, or without a batch a gradient, became not finite; "" if nothing."""

    @abstractmethod
    def evaluate(self) -> tuple[float | None, float | None]:
        """Returns loss and WER (a fraction) on held-out data; None without them."""

    @abstractmethod
    def write_candidate(self, path: Path) -> None:
        """Writes the weights as they are."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns what an interrupted training needs of the weights: tensors, numbers and text."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` returned."""

    # ---- the loop

    def run(self) -> None:
        """Trains all epochs that are left.

        Raises:
            NotFiniteError: The loss or its gradient is not finite.
            MpqError: Audio that cannot be read, too little memory, a state of another training.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        self._resume()
        if self.workers.count > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.loss = nn.parallel.DistributedDataParallel(
                self.loss, device_ids=ids, broadcast_buffers=False, find_unused_parameters=self.passes() > 1
            )
        with stop_requests() as stopped, self.log.opened(self.log_bytes, self.step):
            if self.epoch == 0 and self.step == 0:
                self.begin()
            while self.epoch < self.options.epochs and not self._is_exhausted():
                self._train_epoch(stopped)
        self.workers.barrier()  # the chief has written the last candidate

    def _plan(self, epoch: int) -> list[list[int]]:
        hop = self.model.mel.hop_length / self.model.sample_rate
        slowest = [seconds / min(self.job.augment.speed) for seconds in self.data.durations]
        return plan_epoch(slowest, hop, self.options.batch_frames, self.job.seed, epoch, least=self.workers.count)

    def _steps(self, plan: Sequence[Sequence[int]]) -> int:
        return math.ceil(len(plan) / self.options.accumulate)

    def _train_epoch(self, stopped: Callable[[], bool]) -> None:
        start, before, saved = time.monotonic(), self.seconds, time.monotonic()
        plan = self._plan(self.epoch)
        if self.batch == 0:
            self.totals = []
        own = [batch[self.workers.rank :: self.workers.count] for batch in plan]
        ready = self.reader.read(self.epoch, own[self.batch :])
        with progress(f"epoch {self.epoch + 1}/{self.options.epochs}", len(plan), self.quiet, "batches") as advance:
            advance(self.batch)
            while self.batch < len(plan):
                group = range(self.batch, min(self.batch + self.options.accumulate, len(plan)))
                record, is_stopping = self._update(plan, own, group, ready, stopped)
                self.totals.append(record["loss"])
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
        loss, wer = self.evaluate()
        self.seconds = before + time.monotonic() - start
        done = EpochResult(
            epoch=self.epoch + 1,
            step=self.step,
            train_loss=math.fsum(self.totals) / len(self.totals),
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
            parameters["lr"] = rate * parameters.get("share", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.prepare_update()
        together = [index for batch in group for index in plan[batch]]
        passes = self.passes()
        sums = torch.zeros(len(self.logged) + 1, dtype=torch.float64)  # and requests to stop
        for batch in group:
            waveforms, lengths, targets = next(ready)
            items = [self.data.utterances[index] for index in own[batch]]
            what = f"epoch {self.epoch + 1}, update {self.step + 1}, batch of {len(items)} utterances"
            seconds = waveforms.shape[1] / self.model.sample_rate
            with memory_for(f"{what} of up to {seconds:.1f} s (lower batch_frames)"):
                clean, frames = self._features(waveforms, lengths)
                masked = self._masked(clean, frames, [item.utt_id for item in items])
                one = Batch(masked, frames, clean, targets.to(self.device), items, plan[batch], together, len(group))
                for index in range(passes):
                    is_last = batch == group[-1] and index == passes - 1
                    with nullcontext() if is_last or self.workers.count == 1 else self.loss.no_sync():
                        torch.manual_seed(self._draw(f"dropout {self.step} {batch} {self.workers.rank}"))
                        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                            loss, values, each = self.losses(one, index)
                        faults = torch.tensor([not math.isfinite(float(loss.detach()))], dtype=torch.float64)
                        self.workers.add_up(faults)  # one process's fault stops all, or the others would wait for it
                        if faults.any():
                            bad = [
                                item
                                for item, value in zip(items, each.tolist(), strict=True)
                                if not math.isfinite(value)
                            ]
                            every = [self.data.utterances[index] for index in plan[batch]]  # another process's too
                            raise NotFiniteError(self._not_finite(what, bad or every, one))
                        self.scaler.scale(loss * self.workers.count).backward()
                    sums[:-1] += values.detach().double().cpu()
        sums[-1] = stopped()
        self.workers.add_up(sums)
        self.scaler.unscale_(self.optimizer)
        trained = [one for parameters in self.optimizer.param_groups for one in parameters["params"]]
        total = nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None])
        norm = float(total)
        if not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE):
            items = [self.data.utterances[index] for index in together]
            what = f"gradient of epoch {self.epoch + 1}, update {self.step + 1}"
            raise NotFiniteError(self._not_finite(what, items, None))
        nn.utils.clip_grads_with_norm_(trained, self.options.clip_norm, total)  # a norm of NaN would spoil them all
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.finish_update()
        *means, stops = sums.tolist()
        found = dict(zip(self.logged, means, strict=True))
        record = {"loss": self.total(found)} | found
        record |= {"norm": norm} if math.isfinite(norm) else {}  # float16 overflows now and then: no update was made
        return record | {"rate": rate}, stops > 0

    def _features(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (N, T, F) features and the (N,) valid frames."""
        with torch.no_grad():
            features, frames = self.model.features(waveforms.to(self.device), lengths.to(self.device))
        return features[:, : int(frames.max())], frames

    def _masked(self, features: Tensor, frames: Tensor, utt_ids: Sequence[str]) -> Tensor:
        """Returns the (N, T, F) features with SpecAugment's masks."""
        masks, bands = torch.zeros(features.shape, dtype=torch.bool), self.model.mel.n_mels
        for row, count, utt_id in zip(masks, frames.tolist(), utt_ids, strict=True):
            random = generator(self.job.seed, self.epoch, utt_id, "mask")
            mask = spec_mask(count, bands, self.job.augment, random)
            row[:count, :bands] = mask
            row[:count, bands:] = mask.all(dim=1, keepdim=True)  # pitch has no bands: masked with whole frames
        return features.masked_fill(masks.to(self.device), 0.0)

    def _draw(self, what: str) -> int:
        return int(generator(self.job.seed, self.epoch, "", what).integers(2**62))

    def _not_finite(self, what: str, items: Sequence[Utterance], batch: Batch | None) -> str:
        listed = ", ".join(f'"{item.utt_id}" ({item.source})' for item in items[:5])
        more = f" and {len(items) - 5} more" if len(items) > 5 else ""
        kept = f"; {self.out} keeps the last saved state" if (self.out / "state.pt").exists() else ""
        return (
            f"{what}: the loss or its gradient is not finite{self.blame(batch)}; utterances {listed}{more}; look at "
            f"this audio, or lower learning_rate{kept}"
        )

    # ---- which epochs are good

    def _is_exhausted(self) -> bool:
        if not self.options.patience or not self.epochs:
            return False
        best = rank_epochs(self.epochs, self.options.select)[0]
        return self.epochs[-1].epoch - best.epoch >= self.options.patience

    def candidates(self) -> list[int]:
        """Returns the epochs that may be averaged, the best first."""
        return [one.epoch for one in rank_epochs(self.epochs, self.options.select)[: self.options.average]]

    def candidate_path(self, epoch: int) -> Path:
        return self.out / "epochs" / f"{epoch:04}.safetensors"

    def _write_candidate(self) -> list[int]:
        """Writes the last epoch's weights if they may be averaged; returns which epochs may be."""
        best = self.candidates()
        if self.is_chief and self.epochs[-1].epoch in best:
            (self.out / "epochs").mkdir(exist_ok=True)
            self.write_candidate(self.candidate_path(self.epochs[-1].epoch))
        return best

    # ---- state

    def _save(self) -> None:
        if not self.is_chief:
            return
        state = {
            "fingerprint": self.job.fingerprint,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "processes": self.workers.count,
            "losses": self.totals,
            "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "epochs": [asdict(one) for one in self.epochs],
            "model": self.state(),
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
            self.totals, self.seconds, self.log_bytes = state["losses"], state["seconds"], state["log_bytes"]
            self.epochs = [EpochResult(**one) for one in state["epochs"]]
            self.load_state(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if not self.quiet:
                _log.info("goes on after update %d, epoch %d", self.step, self.epoch + 1)
        self.workers.barrier()
