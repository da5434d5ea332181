"""The rest in few bytes: what comes back, how near it is, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_damage import damaged
from tiny_models import tiny_hybrid, tiny_model
from torch import Tensor

from mpq.artifact.rest import PRECISION, decode_rest, encode_rest
from mpq.errors import MpqError
from mpq.models.base import AsrModel, is_counter
from mpq.models.folding import folded_state


def stored(state: dict[str, Tensor], precision: int = PRECISION) -> tuple[dict[str, Tensor], int]:
    """Returns the tensors that come back, and the bytes that they took."""
    data = encode_rest(state, list(state), precision)
    return decode_rest(data, {name: tuple(tensor.shape) for name, tensor in state.items()}), len(data)


def rest(model: AsrModel) -> dict[str, Tensor]:
    weights = {ref.name for ref in model.weights()}
    state = folded_state(model)
    return {
        name: t for name, t in state.items() if name not in weights and not is_counter(name) and "featu" not in name
    }


def some_vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bias": torch.randn(50, generator=generator),
        "weight": 5 + 0.3 * torch.randn(50, generator=generator),
        "small": 1e-7 * torch.randn(2, 25, generator=generator),
        "other": 1e6 * torch.randn(7, generator=generator),
        "heavy": torch.randn(50, generator=generator) ** 5,
    }


@pytest.mark.parametrize("precision", [1, 6, 10])
def test_every_value_is_kept_to_half_a_step(precision: int) -> None:
    state = some_vectors()
    found, _ = stored(state, precision)
    assert list(found) == list(state)
    for name, tensor in state.items():
        rms = math.sqrt(float(tensor.double().square().mean()))
        step = 2 ** (round(4 * math.log2(rms)) / 4 - precision)
        assert found[name].shape == tensor.shape and found[name].dtype == torch.float32
        # half a step, and the roundings of the step and of the product to float32
        assert float((found[name].double() - tensor.double()).abs().max()) <= 0.5 * step + 2**-22 * float(
            tensor.abs().max()
        ), name
        whole = found[name].double() / step
        torch.testing.assert_close(whole, whole.round(), rtol=1e-6, atol=1e-6)


def test_steps_by_hand() -> None:
    """The root mean square of 3, -4, 5 and 0 is 3.54, nearest to 2^(7/4) = 3.36; the step is an eighth of it."""
    step = np.float32(14107901 / 2**23) * np.float32(0.25)
    found, _ = stored({"bias": torch.tensor([3.0, -4.0, 5.0, 0.0])}, 3)
    assert (found["bias"].numpy() == np.float32([7, -10, 12, 0]) * step).all()


def test_zeros_ones_and_what_has_no_or_one_value_come_back_exactly() -> None:
    state = {
        "bias": torch.zeros(5),
        "running_var": torch.ones(5),
        "beside": torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0]),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(-8.0),
        "zero": torch.zeros(1),
    }
    found, _ = stored(state)
    for name in ("bias", "running_var", "empty", "one", "zero"):
        assert torch.equal(found[name], state[name]), name
    assert found["one"].shape == ()


def test_nothing_takes_nothing() -> None:
    assert stored({}) == ({}, 0)
    found, size = stored({"empty": torch.zeros(0)})
    assert size < 20 and found["empty"].shape == (0,)


def test_all_zeros_take_little() -> None:
    found, size = stored({f"layer.{index}.bias": torch.zeros(500) for index in range(20)})
    assert size < 20 and not any(bool(tensor.any()) for tensor in found.values())


@pytest.mark.parametrize("precision", [2, 6, 7, 8, 12])
def test_the_size_is_near_the_entropy_of_the_codes(precision: int) -> None:
    """Gaussian values in steps of 2^-k of their standard deviation: k + log2(sqrt(2 pi e)) bits each."""
    state = {f"{i}": torch.randn(500, generator=torch.Generator().manual_seed(i)) for i in range(40)}
    _, size = stored(state, precision)
    assert 0 < 8 * size / 20000 - (precision + math.log2(math.sqrt(2 * math.pi * math.e))) < 0.2


def test_values_far_from_zero_are_coded_around_their_mean() -> None:
    state = {f"{i}": torch.randn(500, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    shifted = {name: 50 + tensor for name, tensor in state.items()}
    # the step is 50 times as large: log2(50) = 5.6 bits less each
    assert stored(shifted)[1] < stored(state)[1] - 8 * 500 * 5 / 8


@pytest.mark.parametrize("make", [tiny_model, tiny_hybrid])
def test_a_model_takes_far_less_than_half_precision_and_the_same_bytes_each_time(make) -> None:
    state = rest(make())
    found, size = stored(state, 4)
    assert encode_rest(state, list(state), 4) == encode_rest(dict(reversed(state.items())), list(state), 4)
    assert size < 0.9 * 2 * sum(tensor.numel() for tensor in state.values())
    for name, tensor in state.items():
        if not tensor.any() or (tensor == 1).all():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(MpqError, match=r"norm\.bias: expected numbers, got NaN or infinity"):
        stored({"bias": torch.ones(3), "norm.bias": torch.tensor([1.0, value, 2.0])})


def test_the_least_and_the_greatest_numbers() -> None:
    tiny, great = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    found, _ = stored({"tiny": torch.tensor([tiny, 0.0]), "least": torch.tensor([1e-45, 0.0])})
    assert float(found["tiny"][0]) == tiny and float(found["least"][0]) < 1e-38
    found, _ = stored({"great": torch.tensor([great / 2, -great / 4])})
    torch.testing.assert_close(found["great"], torch.tensor([great / 2, -great / 4]), rtol=0.02, atol=0)
    with pytest.raises(MpqError, match="great: expected values that float32 holds when rounded"):
        stored({"great": torch.tensor([great, great, great * 0.9])}, 1)


def test_a_value_that_is_too_far_from_the_others_is_refused() -> None:
    far = torch.full((2**21,), 1e-3)
    far[0] = 1e9
    with pytest.raises(MpqError, match="far: expected values of at most 2\\^23 steps"):
        stored({"far": far}, 14)


@given(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 2))
def test_damage_is_refused_or_gives_other_values(place: int, value: int, kind: int) -> None:
    state = some_vectors()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    data = damaged(encode_rest(state, list(state)), place, value, kind)
    try:
        found = decode_rest(data, shapes)
        assert kind == 2 and {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    except MpqError as error:
        assert "damaged" in str(error) or "shorter" in str(error)


def test_other_shapes_are_refused() -> None:
    state = some_vectors()
    data = encode_rest(state, list(state))
    for shapes in ({}, {"bias": (50,)}, {"bias": (50,), "more": (3,)}):
        with pytest.raises(MpqError):
            decode_rest(data, shapes)
