"""Models with other feed-forward modules: shapes and configurations, nested slices, and the files they go through."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny_models import large, log_probs, tiny_model

from mpq.allocation.pack import pack
from mpq.artifact.file import read_artifact
from mpq.cli.inspection import inspect
from mpq.errors import MpqError
from mpq.models.checkpoint import read_checkpoint, write_checkpoint
from mpq.models.conformer import ConformerOptions
from mpq.models.reshaping import feed_forwards, reshaped, sliced

LARGE = [((32, 8), (24, 0)), ((20, 5), (32, 8))]
SMALL = [((12, 3), (24, 0)), ((20, 2), (7, 8))]


def options(layers: int = 3, **changes: Any) -> ConformerOptions:
    shape = {"features": 8, "layers": layers, "width": 8, "heads": 2, "ffn_width": 16, "kernel_size": 3}
    conv = {"subsampling": "striding", "subsampling_factor": 2, "subsampling_channels": 4}
    return ConformerOptions(**(shape | conv | changes))


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([((5, 0), (5, 0))] * 3, (5, 0, None, None)),
        ([((5, 0), (6, 0))] * 3, (5, 0, 6, None)),
        ([((5, 2), (6, 2))] * 3, (5, 2, 6, None)),
        ([((5, 2), (5, 0))] * 3, (5, 2, None, 0)),
        ([((4, 1), (4, 3)), ((5, 1), (5, 2)), ((4, 1), (4, 3))], ([4, 5, 4], 1, None, [3, 2, 3])),
        ([((4, 0), (9, 0)), ((4, 2), (8, 2)), ((4, 0), (9, 0))], (4, [0, 2, 0], [9, 8, 9], None)),
    ],
)
def test_options_in_their_shortest_form(shapes: list, expected: tuple) -> None:
    before = options(ffn_width=[1, 2, 3], ffn2_rank=4, dropout=0.1)
    found = before.with_ffn_shapes(shapes)
    assert (found.ffn_width, found.ffn_rank, found.ffn2_width, found.ffn2_rank) == expected
    changed = ("ffn_width", "ffn_rank", "ffn2_width", "ffn2_rank")
    assert {k: v for k, v in asdict(found).items() if k not in changed} == {
        k: v for k, v in asdict(before).items() if k not in changed
    }


def test_with_ffn_shapes_undoes_ffn_shapes() -> None:
    for values in itertools.product((1, 7), (0, 3), (1, 7), (0, 3)):
        shapes = [((2, 3), (4, 0)), (values[:2], values[2:])]
        assert options(2).with_ffn_shapes(shapes).ffn_shapes() == shapes


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([((5, 0), (5, 0))] * 2, "expected one pair for each of 3 blocks, got 2"),
        ([], "expected one pair for each of 3 blocks, got 0"),
        ([((0, 0), (5, 0))] * 3, "ffn_width: expected 1 or more.* got 0"),
        ([((5, 0), (5, -1))] * 3, "ffn2_rank: expected 0 or more.* got -1"),
    ],
)
def test_shapes_that_no_encoder_has(shapes: list, message: str) -> None:
    with pytest.raises(MpqError, match=message):
        options().with_ffn_shapes(shapes)


@pytest.mark.parametrize("family", ["nemo", "mpq"])
def test_reshaped_keeps_all_but_the_feed_forward_modules(family: str) -> None:
    model = large(family)
    new = reshaped(model, SMALL)
    assert type(new) is type(model) and not new.training
    found = {name: tuple(tensor.shape) for name, tensor in new.state_dict().items()}
    assert found["encoder.layers.0.feed_forward1.linear1.outer.weight"] == (12, 3)
    assert found["encoder.layers.0.feed_forward2.linear2.weight"] == (16, 24)
    assert found["encoder.layers.1.feed_forward2.linear2.inner.weight"] == (8, 7)
    kept = 0
    for name, tensor in new.state_dict().items():
        if ".feed_forward1." not in name and ".feed_forward2." not in name:
            assert torch.equal(tensor, model.state_dict()[name]), name
            kept += 1
    assert kept > 50
    assert reshaped(model.train(), SMALL).training


@pytest.mark.parametrize("family", ["nemo", "mpq"])
def test_sliced_is_the_model_with_the_rest_masked(family: str) -> None:
    """Units and ranks beyond the slice are zeroed in the full model; a zero unit adds nothing to what follows it."""
    model, masked = large(family), large(family)
    with torch.no_grad():
        for (width, rank), module in zip(
            [s for block in SMALL for s in block], feed_forwards(masked).values(), strict=True
        ):
            if rank:
                module.linear1.inner.weight[rank:] = 0
                module.linear2.inner.weight[rank:] = 0
                module.linear2.inner.weight[:, width:] = 0
            else:
                module.linear2.weight[:, width:] = 0
    small = sliced(model, SMALL)
    assert (log_probs(small) - log_probs(masked)).abs().max() < 1e-5
    assert (log_probs(small) - log_probs(model)).abs().max() > 1e-2
    assert small.parameter_counts()["total"] < model.parameter_counts()["total"]
    assert torch.equal(log_probs(sliced(model, LARGE)), log_probs(model))


def test_a_slice_by_hand() -> None:
    model = large("nemo")
    small = sliced(model, SMALL)
    old, new = (one.encoder.layers[0].feed_forward1 for one in (model, small))
    x = torch.randn(5, 16)
    inner = x @ old.linear1.inner.weight[:3].T
    hidden = F.silu(inner @ old.linear1.outer.weight[:12, :3].T + old.linear1.outer.bias[:12])
    out = hidden @ old.linear2.inner.weight[:3, :12].T @ old.linear2.outer.weight[:, :3].T + old.linear2.outer.bias
    torch.testing.assert_close(new(x), out)
    assert new.linear1.inner.weight.data_ptr() != old.linear1.inner.weight.data_ptr()


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        ((0, 0), (33, 8), r"layers\.0\.feed_forward1: expected a width of 32 units at most, got 33"),
        ((0, 0), (32, 9), r"layers\.0\.feed_forward1: expected a rank of 1 to 8, got 9"),
        ((1, 1), (32, 0), r"layers\.1\.feed_forward2: expected a rank of 1 to 8, got 0"),
        ((0, 1), (24, 4), r"layers\.0\.feed_forward2: expected rank 0, .*not factored, got 4; factor it first"),
        ((0, 1), (0, 0), "ffn2_width: expected 1 or more"),
    ],
)
def test_what_is_no_slice(place: tuple[int, int], shape: tuple[int, int], message: str) -> None:
    shapes = [list(block) for block in LARGE]
    shapes[place[0]][place[1]] = shape
    with pytest.raises(MpqError, match=message):
        sliced(large("nemo"), [tuple(block) for block in shapes])


@pytest.mark.parametrize("shapes", [SMALL, [((12, 3), (12, 3))] * 2])
@pytest.mark.parametrize("family", ["nemo", "mpq"])
def test_files(family: str, shapes: list, tmp_path: Path) -> None:
    """A model with searched shapes goes through checkpoint, packed file and inspection."""
    model = large(family)
    new = reshaped(model, shapes)
    write_checkpoint(tmp_path / "model.safetensors", new)
    again = read_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(log_probs(again), log_probs(new))
    assert again.to_config() == new.to_config() and again.encoder.options.ffn_shapes() == shapes
    pack(tmp_path / "model.safetensors", tmp_path / "packed", bits=8)
    difference = (log_probs(read_artifact(tmp_path / "packed")) - log_probs(new)).abs().max()
    assert 0 < difference < 0.5  # the rounding of 8 bits
    for file in ("model.safetensors", "packed"):
        layers = {layer.name: layer.shape for layer in inspect(tmp_path / file).layers}
        assert layers["encoder.layers.0.feed_forward1.linear1.outer.weight"] == (12, 3)
        assert layers["encoder.layers.0.feed_forward1.linear2.inner.weight"] == (3, 12)


def test_configuration_of_an_archive_stays_as_it_was(tmp_path: Path) -> None:
    """The keys of a model as NeMo makes it are those that files had before shapes could differ; others are added."""
    write_checkpoint(tmp_path / "a", tiny_model())
    with safe_open(tmp_path / "a", framework="pt") as file:
        keys = set(json.loads(file.metadata()["mpq"])["model"]["encoder"])
    assert keys == set(
        "features layers width heads ffn_width kernel_size subsampling subsampling_factor subsampling_channels "
        "use_bias scale_input conv_norm norm_eps conv_mask attention_mask".split()
    )
    unchanged = reshaped(tiny_model(), [((32, 0), (32, 0))] * 2)
    assert unchanged.to_config() == tiny_model().to_config()
    assert set(large("nemo").to_config()[0]["encoder"]) == keys | {"ffn_rank", "ffn2_width", "ffn2_rank"}
