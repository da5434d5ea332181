"""The loop that every training shares: epochs of updates that can be interrupted anywhere, resumed, and shared out.

The state is saved at the end of the update that is under way (SIGINT, SIGTERM), and after a kill the last saved one is
taken up. All random choices are keyed by seed, epoch, update and utterance, so the losses are the same as without the
interruption. Under `torchrun`, each process takes its share of every batch (PyTorch's DistributedDataParallel).

The subclasses say what is trained and what its loss is: `mpq.training.weights`, `mpq.search.loop` and
`mpq.finetuning.loop`.

Legend: N utterances, S samples, T feature frames, F features.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.config import AugmentConfig, LoopConfig
from mpq.errors import MpqError
from mpq.identity import Inputs
from mpq.models.base import AsrModel
from mpq.models.heads import Targets
from mpq.progress import progress
from mpq.runtime import Processes, keep_freed_memory, memory_for, stop_requests
from mpq.speech.augment import generator
from mpq.speech.manifests import Utterance
from mpq.training.batch import Batch, clean_features, masked_features
from mpq.training.data import BatchReader, TrainingSet, plan_epoch
from mpq.training.log import TrainingLog
from mpq.training.optimization import Stepper
from mpq.training.record import EpochResult, rank_epochs
from mpq.training.state import STATE_FILE, candidate_path, read_state, remove_candidates, write_state

_log = logging.getLogger(__name__)


class NotFiniteError(MpqError):
    """A loss or gradient that is not finite: the training cannot go on."""


@dataclass(frozen=True)
class Job:
    """The work of a training loop.

    Attributes:
        model: The model, with its sample rate, its frames and its device.
        data: The utterances to train on.
        options: The options of the loop.
        augment: The augmentation of the audio.
        channel: The channel to read, such as "error" or "mix" (`mpq.speech.audio.read_audio`).
        seed: The key of all random choices.
        out: The folder to write.
        inputs: All that the weights depend on.
        workers: The processes that share the work.
        quiet: Show no progress and log no messages.
    """

    model: AsrModel
    data: TrainingSet
    options: LoopConfig
    augment: AugmentConfig
    channel: str
    seed: int
    out: Path
    inputs: Inputs
    workers: Processes
    quiet: bool


class TrainingLoop(ABC):
    """The loop. Its position is `epoch` (the present one, from 0), `batch` (the next one), `step` (finished updates).

    Args:
        job: The work.
        loss: The module whose forward pass gives the loss; its parameters are trained.
        optimizer: The optimizer; its groups may have a "share" of the learning rate.
        logged: The names of the values that `losses` returns beside the loss.
    """

    def __init__(self, job: Job, loss: nn.Module, optimizer: torch.optim.Optimizer, logged: Sequence[str]) -> None:
        self.job, self.options, self.model, self.data = job, job.options, job.model, job.data
        self.out, self.workers = job.out, job.workers
        self.is_chief = job.workers.rank == 0
        self.quiet = job.quiet or not self.is_chief
        self.device = next(job.model.parameters()).device
        self.loss, self.logged = loss, tuple(logged)
        self.reader = BatchReader(job.data, job.augment, job.model, job.channel, job.seed, job.options.workers)
        self.log = TrainingLog(self.out, self.options.epochs, self.is_chief, self.quiet, self.options.tensorboard)
        self.epoch, self.batch, self.step = 0, 0, 0
        self.epochs: list[EpochResult] = []
        self.epoch_notes: dict[str, Any] = {}  # what `evaluate` leaves to be said in an epoch's line of the log
        self.totals: list[float] = []
        self.seconds = 0.0
        self.log_bytes = 0
        self.total_steps = self.options.epochs * math.ceil(len(self._plan(0)) / self.options.accumulate)
        self.stepper = Stepper(optimizer, self.options, self.total_steps, self.device)

    # ---- the part of the subclasses

    @abstractmethod
    def begin(self) -> None:
        """Called before the first update: the first process puts the training on record."""

    @abstractmethod
    def prepare_update(self) -> None:
        """Called before each update: training mode, schedules."""

    @abstractmethod
    def passes(self) -> int:
        """Returns the number of losses for each batch of the coming update; their gradients add up."""

    @abstractmethod
    def losses(self, batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss of pass `index` on a batch, its parts and the losses of single utterances.

        Returns:
            This process's share of the loss: the shares of all processes add up to the whole; (len(logged),) parts of
            the loss, which add up in the same way over processes, batches and passes; (N,) losses of the utterances,
            to find one that is at fault.
        """

    @abstractmethod
    def total(self, values: dict[str, float]) -> float:
        """Returns the loss that the logged values of an update make up."""

    @abstractmethod
    def finish_update(self) -> None:
        """Called after each update of the weights."""

    @abstractmethod
    def blame(self, batch: Batch | None) -> str:
        """Returns the place where a loss (or, without a batch, a gradient) became not finite, for a message, or ""."""

    @abstractmethod
    def evaluate(self) -> tuple[float | None, float | None]:
        """Returns loss and WER (a fraction) on held-out data; None without them."""

    @abstractmethod
    def write_candidate(self, path: Path) -> None:
        """Writes the weights as they are."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns the weights for a training to go on from: tensors, numbers and text."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back the weights that `state` returned."""

    # ---- the loop

    def run(self) -> None:
        """Trains all epochs that are left.

        Raises:
            NotFiniteError: The loss or its gradient is not finite.
            MpqError: Audio that cannot be read, too little memory, a saved state that does not fit.
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

    def _train_epoch(self, stopped: Callable[[], bool]) -> None:
        """Does the rest of an epoch: its updates, the held-out data, the weights as a candidate."""
        start = time.monotonic() - self.seconds
        self._train_batches(self._plan(self.epoch), start, stopped)
        self._save()  # so that a kill while the held-out data are scored costs no update
        loss, wer = self.evaluate()
        self.seconds = time.monotonic() - start
        done = EpochResult(
            epoch=self.epoch + 1,
            step=self.step,
            train_loss=math.fsum(self.totals) / len(self.totals),
            dev_loss=loss,
            dev_wer=wer,
            seconds=round(self.seconds - sum(one.seconds for one in self.epochs), 3),
        )
        self.epochs.append(done)
        self.log_bytes = self.log.add_epoch(done, self.epoch_notes)
        candidates = self._write_candidate()
        self.epoch, self.batch = self.epoch + 1, 0
        self._save()
        if self.is_chief:  # not before the state knows the new epoch
            remove_candidates(self.out, but=candidates)

    def _train_batches(self, plan: list[list[int]], start: float, stopped: Callable[[], bool]) -> None:
        """Does the updates that are left of an epoch; saves the state now and then, and before it stops.

        Args:
            plan: The batches of the epoch.
            start: When the training would have begun on this clock (`time.monotonic`), had it not been interrupted.
            stopped: Whether to stop.
        """
        saved = time.monotonic()
        if self.batch == 0:
            self.totals = []
        ready = self.reader.read(self.epoch, [self._share(batch) for batch in plan[self.batch :]])
        with progress(f"epoch {self.epoch + 1}/{self.options.epochs}", len(plan), self.quiet, "batches") as advance:
            advance(self.batch)
            while self.batch < len(plan):
                group = range(self.batch, min(self.batch + self.options.accumulate, len(plan)))
                record, is_stopping = self._update(plan, group, ready, stopped)
                self.totals.append(record["loss"])
                self.step, self.batch = self.step + 1, group[-1] + 1
                self.seconds = time.monotonic() - start
                self.log_bytes = self.log.add_update(self.step, self.epoch + 1, record)
                advance(len(group))
                if is_stopping:
                    self._save()
                    self.workers.barrier()  # nobody leaves while the chief is still writing
                    raise KeyboardInterrupt
                if time.monotonic() - saved > 60 * self.options.save_minutes:
                    self._save()
                    saved = time.monotonic()

    def _share(self, batch: list[int]) -> list[int]:
        """Returns this process's share of a batch."""
        return batch[self.workers.rank :: self.workers.count]

    def _update(
        self,
        plan: list[list[int]],
        group: range,
        ready: Iterator[tuple[Tensor, Tensor, Targets]],
        stopped: Callable[[], bool],
    ) -> tuple[dict[str, float], bool]:
        """Returns the losses of one update of the weights, from the batches of a group, and whether to stop after it.

        A process that was asked to stop tells the others, so that all of them stop after the same update.
        """
        rate = self.stepper.begin(self.step + 1)
        self.prepare_update()
        together = [index for number in group for index in plan[number]]
        sums = torch.zeros(len(self.logged) + 1, dtype=torch.float64)  # and requests to stop
        for number in group:
            waveforms, lengths, targets = next(ready)
            items = [self.data.utterances[index] for index in self._share(plan[number])]
            what = f"epoch {self.epoch + 1}, update {self.step + 1}, batch of {len(items)} utterances"
            seconds = waveforms.shape[1] / self.model.sample_rate
            with memory_for(f"{what} of up to {seconds:.1f} s (lower batch_frames)"):
                clean, frames = clean_features(self.model, waveforms.to(self.device), lengths.to(self.device))
                masked = self._masked(clean, frames, items)
                targets = targets.to(self.device)
                batch = Batch(masked, frames, clean, targets, items, plan[number], together, len(group))
                self._add_gradients(batch, number, number == group[-1], what, sums[:-1])
        sums[-1] = stopped()
        self.workers.add_up(sums)
        norm = self._step(together)
        self.finish_update()
        *means, stops = sums.tolist()
        found = dict(zip(self.logged, means, strict=True))
        record = {"loss": self.total(found)} | found
        record |= {"norm": norm} if math.isfinite(norm) else {}  # float16 overflows now and then: no update was made
        return record | {"rate": rate}, stops > 0

    def _add_gradients(self, batch: Batch, number: int, is_last: bool, what: str, sums: Tensor) -> None:
        """Adds a batch's gradients to those of the weights, and its logged values to `sums`.

        Args:
            batch: The batch.
            number: Its place in the epoch.
            is_last: Whether it is the last one of the update: the processes exchange gradients after it.
            what: The name of the batch in messages.
            sums: (len(logged),) sums, which are changed in place.
        """
        passes = self.passes()
        for index in range(passes):
            with self._gradients_kept_apart(is_last and index == passes - 1):
                random = generator(self.job.seed, self.epoch, "", f"dropout {self.step} {number} {self.workers.rank}")
                torch.manual_seed(int(random.integers(2**62)))
                with torch.autocast(self.device.type, self.stepper.precision, enabled=self.stepper.is_mixed):
                    loss, values, each = self.losses(batch, index)
                self._check_finite(loss, each, batch, what)
                self.stepper.backward(loss * self.workers.count)
            sums += values.detach().double().cpu()

    def _gradients_kept_apart(self, is_exchanged: bool) -> AbstractContextManager[None]:
        """Returns a block in which the processes do not exchange gradients, unless they are to."""
        if isinstance(self.loss, nn.parallel.DistributedDataParallel) and not is_exchanged:
            return self.loss.no_sync()
        return nullcontext()

    def _check_finite(self, loss: Tensor, each: Tensor, batch: Batch, what: str) -> None:
        faults = torch.tensor([not math.isfinite(float(loss.detach()))], dtype=torch.float64)
        self.workers.add_up(faults)  # one process's fault stops all, or the others would wait for it
        if faults.any():
            values = zip(batch.items, each.tolist(), strict=True)
            bad = [item for item, value in values if not math.isfinite(value)]
            every = [self.data.utterances[index] for index in batch.all_indices]  # another process's too
            raise NotFiniteError(self._not_finite(what, bad or every, batch))

    def _step(self, indices: Sequence[int]) -> float:
        """Updates the weights from their gradients; returns the norm of these, not finite where they overflowed.

        Args:
            indices: The utterances that the gradients come from.
        """
        norm = self.stepper.gradient_norm()
        if not norm.isfinite() and not self.stepper.may_overflow:
            items = [self.data.utterances[index] for index in indices]
            what = f"gradient of epoch {self.epoch + 1}, update {self.step + 1}"
            raise NotFiniteError(self._not_finite(what, items, None))
        self.stepper.step(norm)
        return float(norm)

    def _masked(self, features: Tensor, frames: Tensor, items: Sequence[Utterance]) -> Tensor:
        """Returns the (N, T, F) features with SpecAugment's masks."""
        job, utt_ids = self.job, [item.utt_id for item in items]
        return masked_features(features, frames, utt_ids, self.model.mel.n_mels, job.augment, job.seed, self.epoch)

    def _not_finite(self, what: str, items: Sequence[Utterance], batch: Batch | None) -> str:
        listed = ", ".join(f'"{item.utt_id}" ({item.source})' for item in items[:5])
        more = f" and {len(items) - 5} more" if len(items) > 5 else ""
        kept = f"; {self.out} keeps the last saved state" if (self.out / STATE_FILE).exists() else ""
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
        """Returns the path of an epoch's weights, which are there if it is among the best."""
        return candidate_path(self.out, epoch)

    def _write_candidate(self) -> list[int]:
        """Writes the last epoch's weights if they may be averaged; returns which epochs may be."""
        best = self.candidates()
        if self.is_chief and self.epochs[-1].epoch in best:
            path = self.candidate_path(self.epochs[-1].epoch)
            path.parent.mkdir(exist_ok=True)
            self.write_candidate(path)
        return best

    # ---- state

    def _save(self) -> None:
        if not self.is_chief:
            return
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "processes": self.workers.count,
            "losses": self.totals,
            "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "epochs": [asdict(one) for one in self.epochs],
            "model": self.state(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
        }
        write_state(self.out, state)

    def _resume(self) -> None:
        state = read_state(self.out, self.device, self.workers.count)
        if state is not None:
            self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
            self.totals, self.seconds, self.log_bytes = state["losses"], state["seconds"], state["log_bytes"]
            self.epochs = [EpochResult(**one) for one in state["epochs"]]
            self.load_state(state["model"])
            self.stepper.optimizer.load_state_dict(state["optimizer"])
            self.stepper.scaler.load_state_dict(state["scaler"])
            if not self.quiet:
                _log.info(f"goes on after update {self.step}, epoch {self.epoch + 1}")
        self.workers.barrier()
