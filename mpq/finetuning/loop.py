"""The loop of a fine-tuning: rounded weights are trained against the teacher, judged on held-out data, and packed.

BatchNorm keeps its running statistics, and dropout is off, unless the options say otherwise: the audio may be little
and of one speaker, and the teacher's outputs, not transcripts learned by heart, are what the model is to give. (No
model that mpq reads drops layers in training.)

With several allocations one training serves them all: in each update the largest, and one of the others as drawn, see
the same latent weights through their own grids ("sandwich" training, Yu and Huang 2019).
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq.allocation.assignment import Assignment
from mpq.artifact.file import read_artifact, write_artifact
from mpq.artifact.parts import exact_names
from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.files import atomic_path, write_json
from mpq.finetuning.averages import follow, mean_weights, swapped
from mpq.finetuning.baking import bake
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.finetuning.learning_curve import draw_learning_curve
from mpq.finetuning.overflow import overflow, overflow_on
from mpq.finetuning.record import FinetunedSize, FinetuneResult
from mpq.models.base import AsrModel, is_counter
from mpq.models.checkpoint import write_checkpoint
from mpq.quantization.soft_assignment import annealed_alpha
from mpq.speech.augment import generator
from mpq.training.batch import Batch
from mpq.training.data import TrainingSet
from mpq.training.distillation import Distillation, DistillationLosses
from mpq.training.folder import claim_folder, clean_up
from mpq.training.held_out import changed_errors
from mpq.training.loop import Job, NotFiniteError, TrainingLoop
from mpq.training.losses import joint
from mpq.training.objectives import distilled, mixed_distillation, training_mode
from mpq.training.record import EpochResult

FLOAT_FILE = "float.safetensors"
RESULT_FILE = "finetune.json"
CURVE_FILE = "learning_curve.svg"


@dataclass(frozen=True)
class Target:
    """An allocation: its name, its assignment to the model, and the path of its artifact."""

    name: str
    assigned: Assignment
    path: Path


class Finetuner(TrainingLoop):
    """The training of latent weights, scales and unquantized weights against the teacher."""

    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        teacher: AsrModel,
        weights: QuantizedWeights,
        targets: Sequence[Target],
        dev: TrainingSet,
    ) -> None:
        self.recipe, self.tuning, self.teacher, self.weights = recipe, recipe.finetune, teacher, weights
        self.targets, self.dev, self.student = targets, dev, job.model
        tuning = self.tuning
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        # what the file compresses stays as it is: its size, which is promised, depends on the values
        fixed = set(weights.names) | exact_names(teacher, targets[0].assigned.weight_format)
        self.rest = {name: one for name, one in self.student.named_parameters() if name not in fixed}
        if tuning.rest_rate:
            for parameter in self.rest.values():
                parameter.requires_grad_(True)
        loss = Distillation(
            self.student,
            weights,
            teacher,
            bound=tuning.bound,
            label_smoothing=tuning.label_smoothing,
            has_hidden=tuning.hidden_weight > 0,
            has_transcripts=tuning.transcript_weight > 0,
        )
        rest_share = tuning.rest_rate / tuning.learning_rate
        groups = weights.parameter_groups(tuning.scale_rate / tuning.learning_rate, rest_share)
        if tuning.rest_rate:
            groups.append({"params": list(self.rest.values()), "share": rest_share})
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=tuning.betas, fused=True)
        super().__init__(job, loss, optimizer, self._logged())
        self.shadow = [one.detach().clone() for one in self._trained()] if tuning.ema else []
        self.dev_figures: list[list[tuple[float, float | None]]] = []

    @property
    def is_coded(self) -> bool:
        """Whether weights are entropy-coded, so that their size depends on what is trained."""
        return self.weights.weight_format.spec.record.is_entropy_coded

    def _logged(self) -> list[str]:
        names = [f"{head}_kl" for head in self.teacher.heads]
        names += ["hidden"] if self.tuning.hidden_weight else []
        names += ["coded_bits"] if self.tuning.rate_weight else []
        if self.tuning.transcript_weight:
            names += self.teacher.heads
        return names

    def _trained(self) -> list[Tensor]:
        rest = self.rest.values() if self.tuning.rest_rate else ()
        return [*self.weights.parameters(), *rest]

    def begin(self) -> None:
        if self.is_chief:
            claim_folder(self.out, self.job.inputs)
            write_json(self.out / "recipe.json", self.recipe.model_dump())
        self.weights.anneal(self.tuning.alpha[1], is_hard=True)
        self.weights.search()
        loss, wer = self.evaluate()
        start = EpochResult(epoch=0, step=0, train_loss=None, dev_loss=loss, dev_wer=wer, seconds=0.0)
        self.epochs.append(start)
        self.log_bytes = self.log.add_epoch(start, self.epoch_notes)
        self._write_candidate()

    def prepare_update(self) -> None:
        training_mode(self.student, self.tuning)
        start, end = (round(part * self.total_steps) for part in self.tuning.anneal)
        self.weights.anneal(annealed_alpha(self.step, start, end, *self.tuning.alpha), is_hard=self.step >= end)
        is_due = self.step % self.tuning.search_every == 0
        if self.weights.is_annealed:  # once more when the weights are rounded, and then no more
            is_due = self.step == end or (is_due and self.step < end)
        if is_due:
            self.weights.search()

    def passes(self) -> int:
        return min(2, len(self.targets))

    def _allocation(self, index: int) -> int:
        """Returns the allocation of a pass of the coming update: the largest, then one of the others as drawn."""
        if index == 0:
            return 0
        random = generator(self.job.seed, self.epoch, "", f"allocation {self.step}")
        return 1 + int(random.integers(len(self.targets) - 1))

    def losses(self, batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
        # with a weight of 0 transcripts are ignored: the decoder is given what the teacher recognises
        told = [self.tuning.transcript_weight > 0 and item.text is not None for item in batch.items]
        known = torch.tensor(told, device=batch.frames.device)
        heard = batch.clean if self.tuning.teacher_hears == "clean" else batch.features
        with self._astray(f"epoch {self.epoch + 1}, update {self.step + 1}"):
            found = DistillationLosses(
                *self.loss(batch.features, heard, batch.frames, batch.targets, known, self._allocation(index))
            )
        spoken = [len(self.data.tokens[i]) for i in batch.update_indices if self.data.utterances[i].text is not None]
        values = distilled(found, self.workers, self.passes() * batch.of)
        for name, losses in found.transcripts.items():
            tokens = self.teacher.head(name).loss_tokens(sum(spoken), len(spoken))
            values[name] = losses.sum() / tokens / self.passes()
        if self.tuning.rate_weight:
            allocation, shares = self._allocation(index), self.passes() * batch.of * self.workers.count
            bits = self.weights.coded_bits(allocation) / self.weights.coded_weights(allocation)
            values["coded_bits"] = bits / shares
        return self._mixed(values), torch.stack([values[name] for name in self.logged]), found.each()

    @contextmanager
    def _astray(self, what: str) -> Iterator[None]:
        """Turns the error of a weight that can no longer be quantized into that of a training that diverged."""
        try:
            yield
        except MpqError as error:
            raise NotFiniteError(f"{what}: {error}; lower learning_rate or scale_rate") from None

    def _mixed(self, values: dict[str, Any]) -> Any:
        """Returns the loss that its parts make up."""
        told, ctc, heads = self.tuning.transcript_weight, self.tuning.ctc_weight, self.teacher.heads
        imitated = mixed_distillation(values, heads, ctc, self.tuning.hidden_weight)
        transcribed = joint(values, heads, ctc) if told else 0.0
        rate = self.tuning.rate_weight * values.get("coded_bits", 0.0)
        return (1 - told) * imitated + told * transcribed + rate

    def total(self, values: dict[str, float]) -> float:
        return float(self._mixed(values))

    def finish_update(self) -> None:
        latents = [one.detach() for one in self.weights.latents]
        if not nn.utils.get_total_norm(latents).isfinite():  # rounding hides it: codes are always finite
            pairs = zip(self.weights.names, latents, strict=True)
            if faulty := [name for name, one in pairs if not one.norm().isfinite()]:
                raise NotFiniteError(
                    f"epoch {self.epoch + 1}, update {self.step + 1}: the weight {faulty[0]} is not finite; lower "
                    "learning_rate"
                )
        if self.shadow:
            follow(self.shadow, self._trained(), self.tuning.ema, self.step)

    @torch.no_grad()
    def blame(self, batch: Batch | None) -> str:
        if batch is None:
            faulty = [name for name, one in self._named() if one.grad is not None and not one.grad.isfinite().all()]
            return f" (of {faulty[-1]}, the last of {len(faulty)} tensors)" if faulty else ""
        self.student.load_state_dict(self.weights(0), strict=False)  # not what is rounded: codes are always finite
        self.student.eval()
        return overflow(self.student, batch.features, batch.frames)

    def _named(self) -> list[tuple[str, Tensor]]:
        """Returns the trained tensors in the model's order, under the names of the weights that they belong to."""
        order = {name: place for place, name in enumerate(self.student.state_dict())}
        named = [*zip(self.weights.names, self.weights.latents, strict=True), *self.rest.items()]
        for key, quantizer in self.weights.quantizers.items():
            if quantizer.log_scale is not None:
                named.append((self.weights.names[int(key.split(":")[0])], quantizer.log_scale))
        return sorted(named, key=lambda pair: order[pair[0]])

    # ---- held-out data

    def _bake(self, allocation: int) -> None:
        """Gives the student the rounded weights of an allocation, and puts it in eval mode."""
        bake(self.student, self.weights, allocation, self.targets[allocation].assigned)
        self.student.eval()

    def evaluate(self) -> tuple[float, float | None]:
        """Returns divergence and WER on dev, means over the allocations."""
        figures = []
        with swapped(self._trained(), self.shadow):
            for index in range(len(self.targets)):
                with self._astray(f"after update {self.step}"):
                    self._bake(index)
                found = changed_errors(self.teacher, self.student, self.dev, self.job.channel, self.workers)
                if not math.isfinite(found[0]):
                    layer = overflow_on(self.dev.utterances, self.student, self.job.channel)
                    raise NotFiniteError(
                        f"after update {self.step}: the divergence on the held-out data is not finite{layer}; "
                        "lower learning_rate, scale_rate or rest_rate"
                    )
                figures.append(found)
        self.dev_figures.append(figures)
        if self.is_coded:
            self.epoch_notes = {"stretch": [self.weights.stretched(index) for index in range(len(self.targets))]}
        wers = [wer for _, wer in figures if wer is not None]
        divergences = [divergence for divergence, _ in figures]
        return sum(divergences) / len(divergences), sum(wers) / len(wers) if wers else None

    # ---- state

    def _tensors(self) -> dict[str, Tensor]:
        """Returns all that is trained or moves along, by name."""
        quantized = set(self.weights.names)
        found = {f"weights.{name}": tensor for name, tensor in self.weights.state_dict().items()}
        for name, tensor in self.student.state_dict().items():
            if name not in quantized and not is_counter(name):
                found[f"rest.{name}"] = tensor
        return found

    def _take(self, tensors: dict[str, Tensor]) -> None:
        part = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        self.weights.load_state_dict({key.removeprefix("weights."): one for key, one in part.items() if key[0] == "w"})
        rest = {key.removeprefix("rest."): one for key, one in part.items() if key[0] == "r"}
        self.student.load_state_dict(rest, strict=False)

    def write_candidate(self, path: Path) -> None:
        with swapped(self._trained(), self.shadow), atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, temporary)

    def state(self) -> dict[str, Any]:
        return {"tensors": self._tensors(), "shadow": self.shadow, "dev_figures": self.dev_figures}

    def load_state(self, state: dict[str, Any]) -> None:
        self._take(state["tensors"])
        self.shadow = state["shadow"]
        self.dev_figures = [[tuple(pair) for pair in figures] for figures in state["dev_figures"]]

    # ---- the end

    def _load_average(self, epochs: Sequence[int]) -> None:
        """Takes the mean of the weights of some epochs; a tensor that is not trained is that of the first epoch."""
        trained = {f"weights.{name}" for name, _ in self.weights.named_parameters()}
        paths = [self.candidate_path(epoch) for epoch in epochs]
        self._take(mean_weights(paths, lambda name: name in trained or name.startswith("rest.")))
        self.shadow = []  # the candidates are the running average already

    def _choose(self) -> list[int]:
        """Takes the average of the best epochs, or the best one where that is better; returns the epochs."""
        ranked = self.candidates()
        if len(ranked) == 1:
            self._load_average(ranked)
            return ranked
        choices = [ranked, ranked[:1]]
        results = []
        for epochs in choices:
            self._load_average(epochs)
            loss, wer = self.evaluate()
            results.append(((loss if self.tuning.select == "loss" or wer is None else wer), epochs))
        _, epochs = min(results, key=lambda one: one[0])
        if epochs is not choices[-1]:
            self._load_average(epochs)
        return epochs

    def _pack(self) -> None:
        for index, target in enumerate(self.targets):
            self._bake(index)
            assigned = target.assigned
            write_artifact(
                target.path,
                self.student,
                assigned.bits,
                assigned.weight_format,
                assigned.size_bytes,
                quantized=self.weights.quantized(index),
                like=self.teacher,
            )

    def keep_best(self) -> str:
        """Packs the best weights so far; returns the part of a message that says where they are."""
        if not self.epochs:
            return "nothing was trained before"
        best = self.candidates()[0]
        if self.is_chief:
            self._load_average([best])
            self._pack()
        self.workers.barrier()  # torchrun ends all processes when one is gone
        found = next(one for one in self.epochs if one.epoch == best)
        wer = "" if found.dev_wer is None else f", dev WER {100 * found.dev_wer:.2f}%"
        kept = ", ".join(str(target.path) for target in self.targets)
        return f"the best weights until then (epoch {best}{wer}) are in {kept}"

    def _sizes(self, history: Sequence[Sequence[tuple[float, float | None]]]) -> tuple[FinetunedSize, ...]:
        """Returns the result for each allocation: its packed artifact's size, and its errors on the held-out data.

        Args:
            history: Divergence and WER of each allocation after each epoch, the starting weights first.
        """
        parameters = self.teacher.parameter_counts()["total"]
        refs = {ref.name: ref.numel for ref in self.teacher.weights()}
        found = []
        for index, (target, dev) in enumerate(zip(self.targets, history, strict=True)):
            packed = read_artifact(target.path).to(self.device)
            divergence, wer = changed_errors(self.teacher, packed, self.dev, self.job.channel, self.workers)
            size = os.path.getsize(target.path)
            found.append(
                FinetunedSize(
                    name=target.name,
                    path=str(target.path),
                    size_bytes=size,
                    average_bits=sum(target.assigned.bits[name] * n for name, n in refs.items()) / sum(refs.values()),
                    ratio=4 * parameters / size,
                    start_divergence=dev[0][0],
                    start_wer=dev[0][1],
                    divergence=divergence,
                    wer=wer,
                    dev=tuple(dev),
                    stretch=self.weights.stretched(index),
                )
            )
        return tuple(found)

    def finish(self, checkpoint: dict[str, str], transcribed: int) -> FinetuneResult:
        """Writes the artifacts, the float checkpoint and the result."""
        history = list(zip(*self.dev_figures, strict=True))
        averaged = self._choose()
        if self.is_chief:
            self._pack()
        self.workers.barrier()
        result = FinetuneResult(
            fingerprint=self.job.inputs.fingerprint,
            checkpoint=checkpoint,
            sizes=self._sizes(history),
            epochs=tuple(self.epochs),
            averaged=tuple(sorted(averaged)),
            utterances=len(self.data.utterances),
            hours=sum(self.data.durations) / 3600,
            transcribed=transcribed,
            skipped=self.data.skipped,
            too_long=self.data.too_long,
            seed=self.job.seed,
            seconds=self.seconds,
            device=str(self.device),
            processes=self.workers.count,
            inputs=self.job.inputs.values,
        )
        if self.is_chief:
            self.student.load_state_dict(self.weights.floats(), strict=False)
            write_checkpoint(self.out / FLOAT_FILE, self.student)
            draw_learning_curve(self.out / CURVE_FILE, result.epochs, self.quiet)
            write_json(self.out / RESULT_FILE, result.to_json())
            clean_up(self.out)
        self.workers.barrier()
        return result
