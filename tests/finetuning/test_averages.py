"""Averages of trained weights, by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq.finetuning.averages import follow, mean_weights, swapped


def test_the_running_average_begins_as_a_mean() -> None:
    average, weight = torch.tensor([0.0, 8.0]), torch.tensor([10.0, 8.0], requires_grad=True)
    follow([average], [weight], decay=0.5, step=0)
    torch.testing.assert_close(average, torch.tensor([9.0, 8.0]))  # a decay of 1/10
    follow([average], [torch.tensor([0.0, 8.0])], decay=0.5, step=100)
    torch.testing.assert_close(average, torch.tensor([4.5, 8.0]))


def test_weights_are_swapped_within_the_block_alone() -> None:
    weight, other = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match="within"), swapped([weight], [other]):
        assert weight.tolist() == [3, 4]
        raise ValueError("within")
    assert weight.tolist() == [1, 2] and other.tolist() == [3, 4]
    with swapped([weight], []):
        assert weight.tolist() == [1, 2]


def test_the_mean_of_files_is_of_what_is_trained(tmp_path: Path) -> None:
    for index, value in enumerate((1.0, 4.0)):
        one = {"rest.bias": torch.full((2,), value), "fixed": torch.tensor([value]), "rest.count": torch.tensor(index)}
        save_file(one, tmp_path / f"{index}.safetensors")
    found = mean_weights([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], lambda name: name.startswith("rest"))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "rest.bias": [2.5, 2.5],
        "fixed": [1.0],
        "rest.count": 0,
    }
