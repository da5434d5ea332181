"""The mathematics of a scheme: the levels of a group of weights, and the one of them that is next to a weight.

Legend: as in `mpq.quantization.grids`; scales, zero points and ends of ranges are (C, G), those of several candidates
at once (N, C, G).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pkgutil import resolve_name

from torch import Tensor

from mpq.quantization.spec import QuantSpec


class Levels(ABC):
    """The questions that the other modules of this package ask a scheme. Levels are in units of the scale."""

    @abstractmethod
    def bounds(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Returns the ends (C, G) of the range of groups of weights (C, G, size), before any search."""

    @abstractmethod
    def spread(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Returns the scale and the zero point (float32; 0 if the scheme has none) that spread the codes over a range.

        Raises:
            MpqError: A scale does not fit into the spec's scale_dtype.
        """

    @abstractmethod
    def centroids(self, parts: Sequence[Tensor], spec: QuantSpec) -> Tensor | None:
        """Returns the (2^bits,) int8 table of levels for a weight, given as groups of one size, (C, G, size) each.

        None for a scheme that has none.
        """

    @abstractmethod
    def nearest(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        """Returns the float32 codes (C, G, size) of the levels next to the weights."""

    @abstractmethod
    def rounded(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        """Returns the levels (..., C, G, size) of `nearest`, less the zero point; the caller may change them."""

    @abstractmethod
    def of(self, codes: Tensor, spec: QuantSpec, centroids: Tensor | None) -> Tensor:
        """Returns the float32 levels of stored codes of any shape; the zero point is still to be taken off."""


def levels_of(spec: QuantSpec) -> Levels:
    """Returns the mathematics of the spec's scheme."""
    return _levels(spec.record.levels)


@lru_cache
def _levels(name: str) -> Levels:
    found = resolve_name(name)()
    assert isinstance(found, Levels), f"{name} is no child of Levels"
    return found
