"""Posteriors, and searches by enumeration, that the tests of the searches share."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpq.speech.decoding import Hypothesis

INF = float("inf")


def random_log_probs(seed: int, *shape: int, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def every_sequence(log_probs: Tensor, blank_id: int) -> dict[tuple[int, ...], float]:
    """Returns log P_ctc of each label sequence, from all V^T paths of (T, V)."""
    frames, classes = log_probs.shape
    rows, sums = log_probs.tolist(), defaultdict(float)
    for path in itertools.product(range(classes), repeat=frames):
        label = tuple(token for token, _ in itertools.groupby(path) if token != blank_id)
        sums[label] += math.exp(sum(row[token] for row, token in zip(rows, path, strict=True)))
    return {label: math.log(p) for label, p in sums.items() if p > 0}


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-9)


def assert_batches_agree(search: Callable[[Tensor, Tensor, list[int]], list[list[Hypothesis]]]) -> None:
    """Searches a batch, its permutation, and each utterance alone without padding: `search` is told which they are."""
    lengths = torch.tensor([7, 1, 4, 0, 6])
    log_probs = random_log_probs(5, 5, 9, 5)
    for garbage in (-3.0, INF, float("nan")):
        for index, length in enumerate(lengths):
            log_probs[index, length:] = garbage
        together = search(log_probs, lengths, [0, 1, 2, 3, 4])
        order = [3, 0, 4, 2, 1]
        for index, found in zip(order, search(log_probs[order], lengths[order], order), strict=True):
            assert_same(found, together[index])
        for index, length in enumerate(lengths.tolist()):
            alone = search(log_probs[index : index + 1, :length], lengths[index : index + 1], [index])
            assert_same(alone[0], together[index])


Decoder = Callable[[Tensor, Tensor], Tensor]


def toy_decoder(seed: int, classes: int, calls: list[tuple[int, int]] | None = None) -> Decoder:
    """Returns a decoder whose distribution is a random function of the whole prefix and the utterance."""

    def following(prefixes: Tensor, utterances: Tensor) -> Tensor:
        assert prefixes.dtype == utterances.dtype == torch.int64
        assert (prefixes[:, 0] == classes - 1).all() and (prefixes[:, 1:] < classes - 1).all()
        if calls is not None:
            calls.append(tuple(prefixes.shape))
        rows = []
        for prefix, utterance in zip(prefixes.tolist(), utterances.tolist(), strict=True):
            number = int("".join(map(str, [1, *prefix])), base=classes) * 31 + utterance
            rows.append(random_log_probs(1000 * seed + number, classes, sharpness=1.0))
        return torch.stack(rows)

    return following


def every_joint(
    decoder: Decoder, log_probs: Tensor, utterance: int, weight: float, bonus: float, max_length: int
) -> list[Hypothesis]:
    """Returns the best first of all label sequences up to a length, by (T, V) CTC and the toy decoder."""
    eos = log_probs.shape[1] - 1
    ctc = every_sequence(log_probs, eos)
    found = []
    for length in range(max_length + 1):
        for tokens in itertools.product(range(eos), repeat=length):
            score = bonus * length
            if weight > 0:
                score += weight * ctc.get(tokens, -INF)
            if weight < 1:
                prefix = (eos, *tokens, eos)
                for end in range(1, len(prefix)):
                    row = decoder(torch.tensor([prefix[:end]]), torch.tensor([utterance]))[0]
                    score += (1 - weight) * row[prefix[end]].item()
            if score > -INF:
                found.append(Hypothesis(tokens, score))
    return sorted(found, key=lambda each: (-each.score, each.tokens))
