"""Small models of two families with candidates for their feed-forward modules."""

import itertools
from collections.abc import Callable

import torch
from tiny_models import tiny_hybrid, tiny_model
from torch import Tensor

from mpq.models.base import AsrModel
from mpq.models.reshaping import FfnShapes
from mpq.search.space import ModuleSpace
from mpq.search.supernet import Supernet

SPACES = {
    "widths": [
        (ModuleSpace((5, 17, 32), (0,)), ModuleSpace((24,), (0,))),
        (ModuleSpace((1, 20), (0,)), ModuleSpace((8, 9, 16, 32), (0,))),
    ],
    "ranks": [
        (ModuleSpace((32,), (3, 8)), ModuleSpace((24,), (1, 2, 16))),
        (ModuleSpace((20,), (5,)), ModuleSpace((32,), (4, 8))),
    ],
    "both": [
        (ModuleSpace((12, 32), (3, 8)), ModuleSpace((7, 24), (1, 5))),
        (ModuleSpace((1, 10, 20), (5,)), ModuleSpace((32,), (4, 8))),
    ],
}
FAMILIES: dict[str, Callable[..., AsrModel]] = {"nemo": tiny_model, "mpq": tiny_hybrid}


def model_of(family: str, space: str) -> AsrModel:
    """Returns a model of the largest candidates."""
    widths, ranks = (
        [[getattr(block[part], name)[-1] for block in SPACES[space]] for part in (0, 1)] for name in ("widths", "ranks")
    )
    model = FAMILIES[family](ffn_width=widths[0], ffn2_width=widths[1], ffn_rank=ranks[0], ffn2_rank=ranks[1])
    return model.eval()


def architectures(space: str) -> list[FfnShapes]:
    """Returns all of them."""
    modules = [list(itertools.product(one.widths, one.ranks)) for block in SPACES[space] for one in block]
    return [list(zip(flat[::2], flat[1::2], strict=True)) for flat in itertools.product(*modules)]


def output(model: AsrModel) -> Tensor:
    """Returns the encoder's output for a padded batch."""
    waveforms = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    encoded, lengths = model.encode(*model.features(waveforms, torch.tensor([9000, 6000])))
    assert lengths[0] > lengths[1] > 3
    return torch.cat([row[: int(length)] for row, length in zip(encoded, lengths, strict=True)])


def with_logits(supernet: Supernet, seed: int = 0, scale: float = 1.0) -> Supernet:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in (*supernet.width_logits, *supernet.rank_logits):
            one.copy_(scale * torch.randn(one.shape, generator=random))
    return supernet
