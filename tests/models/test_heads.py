"""Losses of the heads against enumeration and formulas written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import small_model, some_features

from mpq.models.heads import Targets, with_ends
from mpq.training.losses import JointLoss


def all_alignments(probs: np.ndarray, tokens: list[int], blank: int) -> float:
    """Returns -log of the summed probability of every path that spells the tokens."""
    total = 0.0
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        spelt = [token for token, _ in itertools.groupby(path) if token != blank]
        if spelt == tokens:
            total += math.prod(probs[frame, token] for frame, token in enumerate(path))
    return -math.log(total)


@pytest.mark.parametrize("texts", [[[0, 1], [2]], [[1, 1], []], [[], []]])
def test_ctc_is_the_sum_over_all_alignments(texts: list[list[int]]) -> None:
    model = small_model()
    features, lengths = some_features(22, 15)
    with torch.no_grad():
        ctc = JointLoss(model, 0.0)(features, lengths, Targets.of(texts))["ctc"]
        encoded, frames = model.encode(features, lengths)
        probs = model.ctc(encoded).double().softmax(dim=-1).numpy()
    assert frames.tolist() == [6, 4]
    for row, tokens in enumerate(texts):
        expected = all_alignments(probs[row, : int(frames[row])], tokens, blank=3)
        assert float(ctc[row]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_attention_loss_is_the_smoothed_cross_entropy_of_each_next_token(smoothing: float) -> None:
    """Of tokens and <eos>; a wrong class has smoothing / C of the target's probability (Szegedy et al. 2016)."""
    model = small_model()
    features, lengths = some_features(30, 24, 20)
    texts = [[0, 2, 1], [1], []]
    with torch.no_grad():
        attention = JointLoss(model, smoothing)(features, lengths, Targets.of(texts))["attention"]
        for row, tokens in enumerate(texts):
            encoded, frames = model.encode(features[row : row + 1, : int(lengths[row])], lengths[row : row + 1])
            total = 0.0
            for step, token in enumerate([*tokens, 3]):
                prefix = torch.tensor([[3, *tokens[:step]]])  # one token at a time: no look at what follows
                logits = model.decoder(prefix, encoded, frames)[0, -1].double().numpy()
                log_probs = logits - np.log(np.exp(logits).sum())
                wanted = np.full(4, smoothing / 4)
                wanted[token] += 1 - smoothing
                total -= float((wanted * log_probs).sum())
            assert float(attention[row]) == pytest.approx(total, rel=1e-5)


def test_ends_are_put_around_the_tokens() -> None:
    prefixes, following = with_ends(Targets.of([[0, 2], [], [1]]), end=3)
    assert prefixes.tolist() == [[3, 0, 2], [3, 0, 0], [3, 1, 0]]
    assert following.tolist() == [[0, 2, 3], [3, -100, -100], [1, 3, -100]]


def test_targets_are_padded() -> None:
    targets = Targets.of([[1], [0, 2, 1], []])
    assert targets.tokens.tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 0]]
    assert targets.lengths.tolist() == [1, 3, 0]
    assert Targets.of([[]]).tokens.shape == (1, 1)


def test_padding_tokens_do_not_count() -> None:
    model, (features, lengths) = small_model(), some_features(30, 24)
    targets = Targets.of([[0, 2], [1]])
    longer = Targets(torch.nn.functional.pad(targets.tokens, (0, 3), value=2), targets.lengths)
    with torch.no_grad():
        for one, other in zip(
            JointLoss(model, 0.1)(features, lengths, targets).values(),
            JointLoss(model, 0.1)(features, lengths, longer).values(),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
