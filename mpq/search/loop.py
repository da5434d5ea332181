"""The second phase of an architecture search: the supernet's weights stay, the logits of the candidates are trained.

In each update the modules compute as the sum of their candidates with the weights lambda = softmax((alpha + G) / T), G
Gumbel noise drawn anew and T falling from update to update (Li et al. 2023, Eq. 3), on held-out data and in eval mode:
no dropout, BatchNorm's running statistics. The penalty (Eq. 4) is eta times the expected parameters in millions; or,
where the user has a size, STRENGTH times the part by which the expected parameters are above it (after NNI), and what
is chosen in the end is the most probable architecture of that size or less.
"""

import math
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq.config import LoopConfig, SearchConfig, TrainConfig
from mpq.files import atomic_path, write_json
from mpq.models.reshaping import conformer, feed_forwards
from mpq.search.record import Architecture, SearchedModule
from mpq.search.supernet import Supernet, module_parameters
from mpq.speech.augment import generator
from mpq.training.batch import Batch
from mpq.training.folder import claim_folder, clean_up
from mpq.training.loop import Job, NotFiniteError, TrainingLoop
from mpq.training.objectives import Objective

ARCHITECTURE_FILE = "architecture.json"
STRENGTH = 10.0
"""The penalty, nats a token, on a model twice as large as it may be: far above what a parameter can gain."""
BETAS = (0.5, 0.999)
"""Adam's betas for the logits, as in DARTS (Liu et al. 2019): the gradient is mostly noise, and follows T."""


def loop_options(search: SearchConfig, train: TrainConfig) -> LoopConfig:
    """Returns the options of the loop that trains the logits."""
    return LoopConfig(
        epochs=search.epochs,
        batch_frames=train.batch_frames,
        learning_rate=search.learning_rate,
        warmup_steps=0,
        schedule="constant",
        precision=train.precision,
        average=1,
        select="last",
        save_minutes=train.save_minutes,
        workers=train.workers,
        tensorboard=train.tensorboard,
    )


class _Relaxed(nn.Module):
    """The supernet with its logits, and the module of its loss, as one module for DistributedDataParallel to wrap."""

    def __init__(self, supernet: Supernet, judge: nn.Module) -> None:
        super().__init__()
        self.supernet, self.judge = supernet, judge

    def forward(self, *arguments: Any) -> Any:
        return self.judge(*arguments)


class ArchitectureSearch(TrainingLoop):
    """The second phase of a search: the training of the logits.

    Args:
        job: The work; its data are the held-out data, its model is the supernet's.
        search: The options of the search.
        objective: The loss of the supernet's model.
        supernet: The trained supernet, whose weights are frozen.
        most_parameters: The largest number of parameters that the architecture may have; None for any number.
    """

    def __init__(
        self, job: Job, search: SearchConfig, objective: Objective, supernet: Supernet, most_parameters: int | None
    ) -> None:
        self.search, self.objective, self.supernet = search, objective, supernet
        self.most_parameters = most_parameters
        for parameter in supernet.model.parameters():
            parameter.requires_grad_(False)
        self.logits = supernet.arch_logits()
        every = [*supernet.width_logits, *supernet.rank_logits]  # Adam wants some, even where there is no choice
        optimizer = torch.optim.Adam(every, lr=0.0, betas=BETAS)
        loss = _Relaxed(supernet, objective.module)
        super().__init__(job, loss, optimizer, (*objective.logged, "millions"))

    def begin(self) -> None:
        if self.is_chief:
            claim_folder(self.out, self.job.inputs)
            write_json(self.out / "recipe.json", {"search": self.search.model_dump()})

    def prepare_update(self) -> None:
        self.model.eval()

    def passes(self) -> int:
        return 1

    def temperature(self) -> float:
        """Returns T of the coming update: geometric from the first to the last."""
        first, last = self.search.temperature
        return float(first * (last / first) ** min(1.0, self.step / max(1, self.total_steps - 1)))

    def losses(self, batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.search.method == "softmax":
            self.supernet.be_sum(1.0, None)
        else:  # the same noise for all batches and processes of an update
            self.supernet.be_sum(self.temperature(), generator(self.job.seed, self.epoch, "", f"gumbel {self.step}"))
        loss, values, each = self.objective.losses(self.loss, batch, self.data)
        millions = self.supernet.expected_millions()
        share = 1 / (batch.of * self.workers.count)
        values = torch.cat([values, (millions * share)[None]])
        return loss + self._penalty(millions) * share, values, each

    def _penalty(self, millions: Any) -> Any:
        """Returns the penalty on the expected parameters of the searched modules."""
        if self.search.target_millions is None:
            return self.search.eta * millions
        excess = (self.supernet.rest / 1e6 + millions) / self.search.target_millions - 1
        return STRENGTH * (excess.relu() if isinstance(excess, Tensor) else max(0.0, excess))

    def total(self, values: dict[str, float]) -> float:
        return float(self.objective.total(values) + self._penalty(values["millions"]))

    def finish_update(self) -> None:
        pass

    def blame(self, batch: Batch | None) -> str:
        return ""

    def evaluate(self) -> tuple[None, None]:
        """Returns None twice: the logits are trained on the held-out data, and `choose` judges the architecture."""
        return None, None

    def write_candidate(self, path: Any) -> None:
        with atomic_path(path) as temporary:
            save_file(self.state(), temporary)

    def state(self) -> dict[str, Any]:
        return {str(index): one.detach().clone() for index, one in enumerate(self.logits)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for index, one in enumerate(self.logits):
            one.copy_(state[str(index)])

    def choose(self) -> Architecture:
        """Trains the logits for the epochs that are left; writes and returns the architecture.

        Raises:
            MpqError: The loss is not finite, or anything else that `TrainingLoop.run` refuses.
        """
        if self.logits:
            self.run()
        shapes = self.supernet.best(self.most_parameters)
        self.supernet.be_whole()
        largest_loss, largest_wer = self.objective.held_out(self.data)
        self.supernet.be_one(shapes)
        loss, wer = self.objective.held_out(self.data)
        for whose, one in (("supernet", largest_loss), ("architecture found", loss)):
            if not math.isfinite(one):
                raise NotFiniteError(
                    f"the loss of the {whose} on the held-out data is {one}; lower train.learning_rate (that of the "
                    "supernet) or search.learning_rate, and choose another --out"
                )
        space, flat = self.supernet.space, [shape for block in shapes for shape in block]
        options = conformer(self.model).options
        chosen = [module_parameters(options.width, width, rank, options.use_bias) for width, rank in flat]
        found = Architecture(
            fingerprint=self.job.inputs.fingerprint,
            modules=tuple(
                SearchedModule(name, width, rank, one.widths, one.ranks, tuple(width_probabilities), tuple(rank_ones))
                for name, (width, rank), one, (width_probabilities, rank_ones) in zip(
                    feed_forwards(self.model), flat, space, self.supernet.probabilities(), strict=True
                )
            ),
            millions=(self.supernet.rest + sum(chosen)) / 1e6,
            largest_millions=self.model.parameter_counts()["total"] / 1e6,
            expected_millions=self.supernet.rest / 1e6 + float(self.supernet.expected_millions().detach()),
            largest_loss=largest_loss,
            largest_wer=largest_wer,
            loss=loss,
            wer=wer,
            epochs=tuple(self.epochs),
            seconds=self.seconds,
            inputs=self.job.inputs.values,
        )
        if self.is_chief:
            write_json(self.out / ARCHITECTURE_FILE, found.to_json())
            clean_up(self.out)
        self.workers.barrier()
        return found
