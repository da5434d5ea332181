"""Batch normalisation against torch's own, on the valid frames put end to end."""

import pytest
import torch
from torch import nn

from mpq.models.batch_norm import batch_norm


def norm_of(channels: int, seed: int = 1) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(channels)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=random) + 0.5)
        norm.bias.copy_(torch.randn(channels, generator=random))
        norm.running_mean.copy_(torch.randn(channels, generator=random))
        norm.running_var.copy_(torch.rand(channels, generator=random) + 0.5)
    return norm


def inputs(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 5


@pytest.mark.parametrize("has_mask", [False, True])
def test_equals_torch_where_nothing_is_padded(has_mask: bool) -> None:
    own, other = norm_of(4), norm_of(4)
    valid = torch.ones(3, 7, dtype=torch.bool) if has_mask else None
    for step in range(2):  # the running statistics move along twice
        x = (inputs(3, 4, 7) + step).requires_grad_()
        y = x.detach().clone().requires_grad_()
        found, expected = batch_norm(own, x, valid), other(y)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        weights = torch.arange(found.numel()).view_as(found).sin()
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.bias.grad, other.bias.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.running_mean, other.running_mean)
    torch.testing.assert_close(own.running_var, other.running_var)
    assert own.num_batches_tracked == other.num_batches_tracked == 2


def test_padding_is_as_if_it_were_not_there() -> None:
    own, other = norm_of(4), norm_of(4)
    lengths = (9, 1, 5)
    x = inputs(3, 4, 9)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    x = x.masked_fill(~valid[:, None], 1e4).requires_grad_()
    joined = torch.cat([x.detach()[row, :, :length] for row, length in enumerate(lengths)], dim=1).T  # (15, 4)
    joined.requires_grad_()
    found, expected = batch_norm(own, x, valid), other(joined)
    kept = found.transpose(1, 2)[valid]  # (15, 4)
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.running_mean, other.running_mean)
    torch.testing.assert_close(own.running_var, other.running_var)
    weights = torch.arange(kept.numel()).view_as(kept).sin()
    (kept * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad.transpose(1, 2)[valid], joined.grad, rtol=1e-4, atol=1e-5)
    assert not x.grad.transpose(1, 2)[~valid].any()


def test_outside_training_it_is_torchs_own() -> None:
    own, other = norm_of(4).eval(), norm_of(4).eval()
    x = inputs(2, 4, 5)
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    assert torch.equal(batch_norm(own, x, valid), other(x))
    assert torch.equal(own.running_mean, norm_of(4).running_mean) and own.num_batches_tracked == 0


def test_one_frame_gives_no_division_by_zero() -> None:
    norm = norm_of(2)
    found = batch_norm(norm, inputs(1, 2, 3), torch.tensor([[True, False, False]]))
    assert found[:, :, 0].flatten().tolist() == pytest.approx(norm.bias.tolist())
    assert norm.running_var.isfinite().all()


def test_half_precision_comes_back_as_it_was_and_sums_in_float32() -> None:
    norm = norm_of(2)
    x = inputs(4, 2, 1000).half() + 200
    with torch.autocast("cpu", torch.bfloat16):
        found = batch_norm(norm, x, None)
    assert found.dtype == torch.float16 and norm.running_mean.dtype == torch.float32
    expected = norm_of(2)(x.float())
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
