"""The optimizer, the course of its learning rate, and the precision of the arithmetic."""

import math

import torch
from torch import nn


def make_optimizer(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov and Hutter 2019) that decays matrices and kernels, not biases, norms and vectors."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim < 2 or name.endswith(("pos_bias_u", "pos_bias_v"))  # one vector for each head
        if parameter.requires_grad:
            (free if is_vector else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """Returns the learning rate of an update: it rises linearly to `peak`, then falls as the schedule says.

    Args:
        step: From 1.
        total_steps: Of the whole training.
        peak: The highest rate, at step `warmup_steps`.
        warmup_steps: 0 for none.
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


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, torch.amp.GradScaler]:
    """Returns the type for autocast (None: all in float32), and the scaler of the loss that float16 needs."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            has_it = torch.cuda.get_device_properties(device).major >= 8  # older ones emulate it, slowly
            name = "bfloat16" if has_it else "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")
    return (None if name == "float32" else getattr(torch, name)), scaler
