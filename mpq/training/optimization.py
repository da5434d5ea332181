"""The optimizer, the course of its learning rate, the precision of the arithmetic, and one update of the weights."""

import math

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mpq.config import LoopConfig

SMALLEST_SCALE = 2.0**-10
"""The least scale of the loss in float16: a gradient that overflows even so is not finite for another reason."""


def make_optimizer(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov and Hutter 2019) that decays matrices and kernels, not biases, norms and vectors."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim < 2 or name.endswith(("pos_bias_u", "pos_bias_v"))  # one vector for each head
        if parameter.requires_grad:
            (free if is_vector else decayed).append(parameter)
    groups = [{"params": one, "weight_decay": decay} for one, decay in ((decayed, weight_decay), (free, 0.0)) if one]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas)


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """Returns the learning rate of an update: it rises linearly to `peak`, then falls as the schedule says.

    Args:
        step: The update's number, from 1.
        total_steps: The updates of the whole training.
        peak: The highest rate, at step `warmup_steps`.
        warmup_steps: The updates in which the rate rises; 0 for none.
        schedule: "inverse_sqrt" (Vaswani et al. 2017), "cosine" or "linear" (to 0 at `total_steps`), "constant".

    >>> [round(learning_rate(step, 100, 1.0, 10, "linear"), 3) for step in (1, 10, 55, 100)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup_steps) / step)
    return peak * {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, GradScaler]:
    """Returns the type for autocast (None: all in float32), and the scaler of the loss that float16 needs."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            has_it = torch.cuda.get_device_properties(device).major >= 8  # older ones emulate it, slowly
            name = "bfloat16" if has_it else "float16"
    scaler = GradScaler(device.type, enabled=name == "float16")
    return (None if name == "float32" else getattr(torch, name)), scaler


class Stepper:
    """Makes the updates of the weights: learning rate, loss scaled for float16, gradient clipped to a norm.

    Args:
        optimizer: Its parameter groups may have a "share" of the learning rate (1 without).
        options: The options of the loop.
        total_steps: The updates of the whole training.
        device: The device that computes.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, options: LoopConfig, total_steps: int, device: torch.device
    ) -> None:
        self.optimizer, self.options, self.total_steps = optimizer, options, total_steps
        self.precision, self.scaler = choose_precision(options.precision, device)

    @property
    def is_mixed(self) -> bool:
        """Whether the losses are computed under autocast."""
        return self.precision is not None

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite calls for a smaller scale of the loss only."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE

    def begin(self, step: int) -> float:
        """Returns the learning rate of an update (from 1), and sets it; forgets the gradients of the update before."""
        options = self.options
        rate = learning_rate(step, self.total_steps, options.learning_rate, options.warmup_steps, options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        return rate

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss to those of the weights."""
        torch.autograd.backward(self.scaler.scale(loss))

    def gradient_norm(self) -> Tensor:
        """Returns () the norm of all gradients, freed of the loss's scale; called once, before `step`."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.get_total_norm([one.grad for one in self._trained() if one.grad is not None])

    def step(self, norm: Tensor) -> None:
        """Updates the weights; where the gradients overflowed they stay as they are, and the loss's scale gets smaller.

        Args:
            norm: () what `gradient_norm` returned.
        """
        # a norm of NaN would spoil them all
        nn.utils.clip_grads_with_norm_(self._trained(), self.options.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _trained(self) -> list[Tensor]:
        return [one for group in self.optimizer.param_groups for one in group["params"]]
