"""The sinusoids of positions, absolute or relative."""

import math

import torch
from torch import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Returns the (M, width) sinusoids of (M,) positions: sine in even columns, cosine in odd (Vaswani et al. 2017)."""
    rates = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) * -(math.log(10000.0) / width)
    angles = positions[:, None].float() * torch.exp(rates)
    table = torch.zeros(len(positions), width, device=positions.device)
    table[:, 0::2] = torch.sin(angles)
    table[:, 1::2] = torch.cos(angles[:, : width // 2])
    return table
