"""How a supernet weighs its candidates: lambda, its noise and its gradients."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_supernets import SPACES, model_of, with_logits
from torch import Tensor, nn

from mpq.search.supernet import Supernet, nested_mask


def lambdas(supernet: Supernet, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], Tensor]]:
    """Returns (candidates, weights) of each choice that `be_sum` makes a mask of."""
    found: list[tuple[tuple[int, ...], Tensor]] = []

    def kept(candidates: Sequence[int], weights: Tensor) -> Tensor:
        found.append((tuple(candidates), weights))
        return nested_mask(candidates, weights)

    monkeypatch.setattr("mpq.search.supernet.nested_mask", kept)
    return found


def test_lambda_is_the_gumbel_softmax_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, which is given the same noise, as the exponential draws that it makes of it."""
    supernet = with_logits(Supernet(model_of("mpq", "both"), SPACES["both"]))
    found = lambdas(supernet, monkeypatch)
    supernet.be_sum(0.7, np.random.default_rng(5))
    random, masks = np.random.default_rng(5), iter(found)
    for index, one in enumerate(supernet.space):
        for candidates, logits in (
            (one.widths, supernet.width_logits[index]),
            (one.ranks, supernet.rank_logits[index]),
        ):
            if len(candidates) == 1:
                continue
            noise = torch.from_numpy(random.gumbel(size=len(candidates))).float()
            draws = (-noise).exp()
            monkeypatch.setattr(Tensor, "exponential_", lambda self, draws=draws: self.copy_(draws))
            expected = nn.functional.gumbel_softmax(logits, tau=0.7)
            monkeypatch.undo()
            sizes, weights = next(masks)
            assert sizes == candidates
            torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-4)
    assert next(masks, None) is None


def test_the_coldest_lambda_draws_by_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = with_logits(Supernet(model_of("mpq", "widths"), SPACES["widths"]))
    found, random, draws = lambdas(supernet, monkeypatch), np.random.default_rng(0), 3000
    for _ in range(draws):
        supernet.be_sum(0.001, random)
    choices = [one for one in supernet.width_logits if len(one) > 1]
    for place, logits in enumerate(choices):
        weights = torch.stack([weights for _, weights in found[place :: len(choices)]]).detach()
        assert (weights.max(dim=1).values > 0.99).float().mean() > 0.98
        shares = weights.argmax(dim=1).bincount(minlength=len(logits)) / draws
        error = (shares - logits.detach().softmax(0)).abs()
        assert (error < 4 * (logits.softmax(0) * (1 - logits.softmax(0)) / draws).sqrt()).all()


@pytest.mark.parametrize("space", SPACES)
def test_gradients_of_all_logits_by_differences(space: str) -> None:
    """Through the whole model."""
    supernet = with_logits(Supernet(model_of("mpq", space), SPACES[space]))
    random = torch.Generator().manual_seed(1)
    features, direction = torch.randn(2, 40, 23, generator=random), torch.randn(16, generator=random)

    def value() -> Tensor:
        supernet.be_sum(0.5, np.random.default_rng(3))
        return (supernet.model.encode(features, torch.tensor([40, 30]))[0].double() @ direction.double()).sum()

    value().backward()
    for logits in supernet.arch_logits():
        expected = []
        for index in range(len(logits)):
            ends = []
            for change in (1e-2, -1e-2):
                with torch.no_grad():
                    logits[index] += change
                    ends.append(value().item())
                    logits[index] -= change
            expected.append((ends[0] - ends[1]) / 2e-2)
        assert max(map(abs, expected)) > 1e-3
        assert logits.grad.tolist() == pytest.approx(expected, rel=1e-2, abs=1e-3 + 1e-2 * max(map(abs, expected)))


def test_without_noise_lambda_is_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = with_logits(Supernet(model_of("mpq", "ranks"), SPACES["ranks"]))
    found = lambdas(supernet, monkeypatch)
    supernet.be_sum(1.0, None)
    choices = [one for one in supernet.rank_logits if len(one) > 1]
    for (_, weights), logits in zip(found, choices, strict=True):
        torch.testing.assert_close(weights, logits.exp() / logits.exp().sum())
    assert [one[0] for one in supernet.probabilities()] == [[1.0]] * 4
    for (_, ranks), logits in zip(supernet.probabilities(), supernet.rank_logits, strict=True):
        assert ranks == pytest.approx(logits.detach().softmax(0).tolist())
