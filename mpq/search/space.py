"""The candidates of an architecture search: which widths and ranks each feed-forward module of the encoder may have.

FW and BN in Li et al. 2023, section 3, are the hidden width and the rank (bottleneck) of a block's first feed-forward
module, FW-m and BN-m those of its second.

Legend: K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpq.config import SearchConfig
from mpq.errors import MpqError

PAPER_WIDTHS = tuple(range(1024, 4097, 128))
PAPER_RANKS = tuple(range(80, 241, 20))
PAPER_WIDTHS_WITH_RANKS = tuple(range(1024, 4097, 512))
PAPER_RANKS_WITH_WIDTHS = (120, 160, 200, 240)
"""The paper's candidates, for a width of 256."""


@dataclass(frozen=True)
class ModuleSpace:
    """The candidates of one feed-forward module, ascending.

    Attributes:
        widths: (K,) numbers of hidden units.
        ranks: (K',) ranks of both matrices; (0,) where these are not factored.
    """

    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def largest(self) -> tuple[int, int]:
        return self.widths[-1], self.ranks[-1]


SearchSpace = Sequence[tuple[ModuleSpace, ModuleSpace]]
"""For each block the candidates of its first and of its second module."""


def search_space(
    config: SearchConfig, own: Sequence[tuple[tuple[int, int], tuple[int, int]]], inputs: int, is_trained: bool
) -> SearchSpace:
    """Returns the candidates of each module.

    A width or rank that is not searched is the model's own. By default, an untrained model's candidates are the
    paper's; a trained model's go from a quarter of its width to all of it in 25 steps, and from a third of the rank at
    which the factors have as many weights as the matrix to all of that rank in 9 (with both, in 7, and from half of it
    in 4), which is the same for the paper's sizes.

    Args:
        config: The options of the search.
        own: For each block the (width, rank) of the model's two modules.
        inputs: The encoder's width.
        is_trained: Whether the model has trained weights, of which candidates are parts.

    Raises:
        MpqError: Candidates that are not ascending, not for each block, or larger than a trained model's.
    """
    faults = [f"{key}: {fault}" for key, fault in candidate_faults(config, len(own))]
    if faults:
        raise MpqError("\n".join(f"[search] {fault}" for fault in faults))
    found: list[list[ModuleSpace]] = []
    for part, (width_key, rank_key) in enumerate((("ffn_width", "ffn_rank"), ("ffn2_width", "ffn2_rank"))):
        all_widths = _each(config, width_key, len(own)) or _each(config, "ffn_width", len(own))
        all_ranks = _each(config, rank_key, len(own)) or _each(config, "ffn_rank", len(own))
        modules = []
        for block, shapes in enumerate(own):
            width, rank = shapes[part]
            widths = _widths(config, all_widths[block] if all_widths else None, width, is_trained)
            ranks = _ranks(config, all_ranks[block] if all_ranks else None, width, rank, inputs, is_trained)
            where = f"of block {block + 1}'s {'second' if part else 'first'} module"
            if is_trained and widths[-1] > width:
                faults.append(f"{width_key}: expected candidates up to {width}, the width {where}, got {widths[-1]}")
            most = min(inputs, widths[-1])
            if config.space != "widths" and ranks[-1] > most:
                faults.append(f"{rank_key}: expected ranks up to {most}, the smaller side {where}, got {ranks[-1]}")
            modules.append(ModuleSpace(tuple(widths), tuple(ranks)))
        found.append(modules)
    if faults:
        raise MpqError("\n".join(f"[search] {fault}" for fault in dict.fromkeys(faults)))
    return list(zip(*found, strict=True))


def candidate_faults(config: SearchConfig, layers: int | None) -> list[tuple[str, str]]:
    """Returns (key, fault) for each faulty list of candidates.

    Args:
        config: The options of the search.
        layers: The number of the model's blocks; None where it is not known yet.
    """
    faults = []
    for key in ("ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank"):
        value = getattr(config, key)
        if value is None:
            continue
        is_nested = bool(value) and isinstance(value[0], list)
        if is_nested and layers is not None and len(value) != layers:
            faults.append((key, f"expected one list for each of the {layers} blocks, got {len(value)}"))
        lists: list[Any] = value if is_nested else [value]
        if any(not one or one != sorted(set(one)) for one in lists):
            faults.append((key, f"expected rising candidates, one or more, got {value}"))
    return faults


def _widths(config: SearchConfig, named: Sequence[int] | None, width: int, is_trained: bool) -> Sequence[int]:
    """Returns the candidate widths of a module: its own, those that the user names, or the default ones."""
    if config.space == "ranks":
        return (width,)
    if named:
        return named
    if is_trained:
        return _steps(width / 4, width, 7 if config.space == "both" else 25)
    return PAPER_WIDTHS_WITH_RANKS if config.space == "both" else PAPER_WIDTHS


def _ranks(
    config: SearchConfig, named: Sequence[int] | None, width: int, rank: int, inputs: int, is_trained: bool
) -> Sequence[int]:
    """Returns the candidate ranks of a module: its own, those that the user names, or the default ones."""
    if config.space == "widths":
        return (rank,)
    if named:
        return named
    is_both = config.space == "both"
    if is_trained:
        most = int(inputs * width / (inputs + width))  # as many weights as before
        return _steps(most / (2 if is_both else 3), most, 4 if is_both else 9)
    return PAPER_RANKS_WITH_WIDTHS if is_both else PAPER_RANKS


def _each(config: SearchConfig, key: str, layers: int) -> list[list[int]] | None:
    """Returns the candidates of each block; None if the user names none."""
    value = getattr(config, key)
    if value is None:
        return None
    return value if isinstance(value[0], list) else [value] * layers


def _steps(first: float, last: float, count: int) -> tuple[int, ...]:
    """Returns whole numbers from first to last in equal steps (fewer where they fall together).

    >>> _steps(1024, 4096, 25) == PAPER_WIDTHS and _steps(80, 240, 9) == PAPER_RANKS
    True
    """
    values = {max(1, round(first + (last - first) * index / (count - 1))) for index in range(count)}
    return tuple(sorted(values))
