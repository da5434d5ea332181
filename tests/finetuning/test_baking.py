"""Steps that keep a size: as small as they may be, compared with all others; and what cannot be kept."""

import math

import pytest
import torch
from torch import Tensor

from mpq.artifact.weights import WeightFormat, encode_all
from mpq.errors import MpqError
from mpq.finetuning.baking import AN_OCTAVE, keep_size
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.quantization.spec import QuantSpec

FORMAT = WeightFormat(QuantSpec(8, "entropy"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(allocations: int = 1) -> QuantizedWeights:
    weights = {"a": drawn(40, 50), "b": 0.1 * drawn(30, 20, seed=1), "zeros": torch.zeros(3, 4), "one": drawn(1, 1)}
    return QuantizedWeights(weights, [dict.fromkeys(weights, 3.0)] * allocations, FORMAT, {}, "learned")


def coded(weights: QuantizedWeights, allocation: int = 0) -> int:
    return sum(map(len, encode_all(list(weights.quantized(allocation).values()), 3, FORMAT)))


@pytest.mark.parametrize("share", [1.0, 0.999, 0.97, 0.6, 0.2])
def test_the_smallest_factor_that_fits(share: float) -> None:
    weights = made()
    most, tried = int(share * coded(weights)), []

    def size() -> int:
        tried.append(weights.stretched(0))
        return coded(weights)

    keep_size(weights, 0, size, most)
    k = AN_OCTAVE * math.log2(weights.stretched(0))
    assert coded(weights) <= most and k == pytest.approx(round(k), abs=1e-3)
    assert (round(k) == 0) == (share == 1)
    if k > 0:
        weights.stretch(0, 2 ** ((round(k) - 1) / AN_OCTAVE))
        assert coded(weights) > most
    assert len(tried) <= 7  # the estimate knows where to look


def test_a_size_that_grew_back_is_given_its_steps_again() -> None:
    weights = made()
    before = coded(weights)
    with torch.no_grad():
        weights.latents[0].mul_(1.5)
    keep_size(weights, 0, lambda: coded(weights), before)
    assert 1.2 < weights.stretched(0) < 1.5
    with torch.no_grad():
        weights.latents[0].div_(1.5)
    keep_size(weights, 0, lambda: coded(weights), before)
    assert weights.stretched(0) == 1.0 and coded(weights) == before


def test_each_allocation_has_its_own_steps() -> None:
    weights = made(2)
    before = coded(weights)
    keep_size(weights, 1, lambda: coded(weights, 1), before - 20)
    assert weights.stretched(0) == 1.0 < weights.stretched(1)
    assert coded(weights, 0) == before >= coded(weights, 1) + 20


def test_a_size_below_all_is_refused() -> None:
    weights = made()
    with pytest.raises(
        MpqError, match="the weights cannot be coded in a file of 3 bytes, however coarse their steps are"
    ):
        keep_size(weights, 0, lambda: coded(weights), 3)
