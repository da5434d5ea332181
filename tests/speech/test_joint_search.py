"""The searches against all V^T paths, torch's CTC loss, and all label sequences with a toy decoder."""

import math

import pytest
import torch
from tiny_searches import (
    INF,
    assert_batches_agree,
    assert_same,
    every_joint,
    every_sequence,
    random_log_probs,
    toy_decoder,
)
from torch import Tensor

from mpq.errors import MpqError
from mpq.speech.ctc_search import ctc_prefix_beam
from mpq.speech.decoding import Hypothesis
from mpq.speech.joint_search import joint_beam


@pytest.mark.parametrize("bonus", [0.0, 0.7, -0.4])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_wide_joint_beam_is_the_enumeration(weight: float, bonus: float) -> None:
    for seed in range(4):
        classes, frames = 3 + seed % 2, 2 + seed % 3
        log_probs = random_log_probs(seed, 2, frames, classes)
        decoder = toy_decoder(seed, classes)
        lengths = torch.tensor([frames, frames - 1])
        limit = 2 if seed == 3 else None
        beams = joint_beam(decoder, log_probs, lengths, classes - 1, 300, weight, bonus, limit)
        small = joint_beam(decoder, log_probs, lengths, classes - 1, 12, weight, bonus, limit)
        for index, length in enumerate(lengths.tolist()):
            expected = every_joint(decoder, log_probs[index, :length], index, weight, bonus, limit or length)
            assert_same(beams[index], expected)
            assert_same(small[index][:1], expected[:1])


def test_joint_scores_of_a_narrow_beam_are_exact() -> None:
    log_probs = random_log_probs(11, 6, 5, 4)
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    decoder = toy_decoder(2, 4)
    for index, beam in enumerate(joint_beam(decoder, log_probs, lengths, 3, 3, 0.5, 0.2, candidates=2)):
        exact = {
            e.tokens: e.score for e in every_joint(decoder, log_probs[index, : lengths[index]], index, 0.5, 0.2, 5)
        }
        assert 1 <= len(beam) <= 3
        assert {each.tokens: each.score for each in beam} == pytest.approx(
            {each.tokens: exact[each.tokens] for each in beam}, abs=1e-9
        )


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_joint_beam_does_not_depend_on_the_batch(weight: float) -> None:
    def search(log_probs: Tensor, lengths: Tensor, indices: list[int]) -> list[list[Hypothesis]]:
        decoder, names = toy_decoder(3, 5), torch.tensor(indices)
        return joint_beam(lambda p, u: decoder(p, names[u]), log_probs, lengths, 4, 3, weight, 0.1, candidates=3)

    assert_batches_agree(search)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_joint_beam_of_one_is_greedy(weight: float) -> None:
    for seed in range(12):
        frames, eos = 5, 3
        log_probs = random_log_probs(seed, 1, frames, eos + 1)
        decoder = toy_decoder(seed, eos + 1)
        ctc = every_sequence(log_probs[0], eos)
        tokens, attention = (), 0.0
        while True:  # takes the best of ending and each token, by the combined score
            following = decoder(torch.tensor([[eos, *tokens]]), torch.tensor([0]))[0].tolist()
            options = []
            for token in range(eos + 1):
                longer = (*tokens, token) if token < eos else tokens
                if token < eos:
                    p = sum(math.exp(q) for label, q in ctc.items() if label[: len(longer)] == longer)
                else:
                    p = math.exp(ctc[tokens]) if tokens in ctc else 0.0
                total = (weight * math.log(p) if p else -INF) if weight else 0.0
                total += (1 - weight) * (attention + following[token]) + 0.1 * len(longer)
                if token == eos or len(tokens) < frames:
                    options.append((total, token))
            score, token = max(options)
            if token == eos:
                break
            tokens, attention = (*tokens, token), attention + following[token]
        found = joint_beam(decoder, log_probs, torch.tensor([frames]), eos, 1, weight, 0.1)[0]
        assert_same(found, [Hypothesis(tokens, score)])


def test_max_length_forces_an_end() -> None:
    log_probs = random_log_probs(0, 2, 5, 4)
    decoder = toy_decoder(0, 4)
    for weight in (0.0, 0.5, 1.0):
        beams = joint_beam(decoder, log_probs, torch.tensor([5, 0]), 3, 4, weight, 50.0, max_length=2)
        assert [len(each.tokens) for each in beams[0]] == [2, 2, 2, 2]
        assert beams[1] == [Hypothesis((), 0.0)]
        empty = joint_beam(decoder, log_probs, torch.tensor([5, 0]), 3, 4, weight, 50.0, max_length=0)
        assert_same(empty[0], every_joint(decoder, log_probs[0], 0, weight, 50.0, 0))
    longer = joint_beam(decoder, log_probs, torch.tensor([5, 0]), 3, 1, 0.0, 50.0, max_length=8)
    assert len(longer[0][0].tokens) == 8  # the decoder alone may write more tokens than there are frames
    assert longer[1] == [Hypothesis((), 0.0)]


def test_decoder_is_asked_once_a_length_and_not_without_need() -> None:
    log_probs = random_log_probs(0, 3, 6, 4)
    lengths = torch.tensor([6, 5, 0])
    calls: list[tuple[int, int]] = []
    joint_beam(toy_decoder(0, 4, calls), log_probs, lengths, 3, 4, 0.5, 1.0)
    assert calls[0] == (2, 1) and [width for _, width in calls] == list(range(1, len(calls) + 1))
    assert max(rows for rows, _ in calls) == 8 and len(calls) <= 7
    calls.clear()
    joint_beam(toy_decoder(0, 4, calls), log_probs, lengths, 3, 4, 1.0)
    joint_beam(toy_decoder(0, 4, calls), log_probs, torch.zeros(3, dtype=torch.long), 3)
    assert not calls
    # Without CTC its values are not read; and the search stops as soon as no live hypothesis can win.
    certain = torch.tensor([0.01, 0.01, 0.01, 0.97]).log()
    count = []
    found = joint_beam(
        lambda p, u: count.append(len(p)) or certain.expand(len(p), 4), log_probs * math.nan, lengths, 3, 2, 0.0
    )
    assert found[0][0].tokens == () and len(count) == 2


def test_a_length_bonus_that_is_still_to_come_keeps_the_search_going() -> None:
    # () and (0,) are finished and better than (0, 0), from which each certain token gains a bonus.
    rows = torch.tensor([[0.1, 1e-9, 0.9], [0.1, 1e-9, 0.9], [0.99, 1e-9, 0.01]]).log()

    def following(prefixes: Tensor, utterances: Tensor) -> Tensor:
        return rows[min(prefixes.shape[1], 3) - 1].expand(len(prefixes), 3)

    found = joint_beam(following, torch.zeros(1, 16, 3), torch.tensor([16]), 2, 2, 0.0, 0.8)[0]
    assert [each.tokens for each in found] == [(0,) * 16, (0,) * 15]


def test_candidates_limit_the_extensions() -> None:
    log_probs = random_log_probs(4, 1, 4, 6)
    likeliest = {row[:5].argmax().item() for row in log_probs[0]}
    assert all(set(each.tokens) <= likeliest for each in ctc_prefix_beam(log_probs, torch.tensor([4]), 5, 50, 1)[0])
    decoder = toy_decoder(6, 6)
    for weight in (0.0, 0.6):
        allowed = [()]
        for _ in range(4):
            row = decoder(torch.tensor([[5, *allowed[-1]]]), torch.tensor([0]))[0, :5]
            allowed.append((*allowed[-1], row.argmax().item()))
        found = joint_beam(decoder, log_probs, torch.tensor([4]), 5, 50, weight, candidates=1)[0]
        assert {each.tokens for each in found} <= set(allowed) and len(found) > 1
    exact = every_sequence(log_probs[0], 5)
    found = joint_beam(decoder, log_probs, torch.tensor([4]), 5, 50, 1.0, candidates=1)[0]
    starts = [sum(math.exp(p) for label, p in exact.items() if label[:1] == (token,)) for token in range(5)]
    assert {each.tokens[:1] for each in found} == {(), (starts.index(max(starts)),)}
    many = {"beam_size": 9, "candidates": 99}
    assert ctc_prefix_beam(log_probs, torch.tensor([4]), 5, **many) == ctc_prefix_beam(
        log_probs, torch.tensor([4]), 5, beam_size=9
    )


def test_a_vocabulary_of_the_blank_alone_and_a_batch_of_none() -> None:
    silence = torch.zeros(2, 3, 1)
    for beams in (
        ctc_prefix_beam(silence, torch.tensor([3, 0]), 0),
        joint_beam(lambda p, u: torch.zeros(len(p), 1), silence, torch.tensor([3, 0]), 0),
    ):
        assert beams == [[Hypothesis((), 0.0)]] * 2
    nothing = torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.long)
    assert ctc_prefix_beam(*nothing, 3) == joint_beam(toy_decoder(0, 4), *nothing, 3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam_size": 0}, "beam_size"),
        ({"candidates": 0}, "candidates"),
        ({"lengths": torch.tensor([4])}, "0..3 frames"),
        ({"lengths": torch.tensor([3, 3])}, "lengths"),
        ({"log_probs": torch.full((1, 3, 4), math.nan)}, "not finite"),
        ({"id": 4}, "blank id below V"),
        ({"ctc_weight": 1.5}, "ctc_weight"),
        ({"max_length": -1}, "max_length"),
        ({"decoder": lambda p, u: torch.full((len(p), 4), math.nan)}, "not finite"),
        ({"decoder": lambda p, u: torch.zeros(len(p), 3)}, "expected \\(1, 4\\)"),
    ],
)
def test_faults_of_the_caller(change: dict, message: str) -> None:
    given = {"log_probs": random_log_probs(0, 1, 3, 4), "lengths": torch.tensor([3]), "id": 3}
    given |= {"decoder": toy_decoder(0, 4)} | change
    decoder, frames = given.pop("decoder"), [given.pop("log_probs"), given.pop("lengths"), given.pop("id")]
    with pytest.raises(MpqError, match=message):
        joint_beam(decoder, *frames, **given)
    if not {"ctc_weight", "max_length", "decoder"} & set(change):
        with pytest.raises(MpqError, match=message):
            ctc_prefix_beam(*frames, **given)


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("candidates", [None, 2])
def test_the_blank_may_be_another_class_than_the_end(ctc_weight: float, candidates: int | None) -> None:
    """Blank first and <eos> last, as in ESPnet and WeNet; the decoder's score of the blank counts for nothing."""
    random = torch.Generator().manual_seed(5)
    ctc = (2 * torch.randn(2, 7, 4, generator=random)).log_softmax(dim=-1)  # three tokens and the blank, which is <eos>
    table = (2 * torch.randn(8, 4, generator=random)).log_softmax(dim=-1)
    lengths, options = torch.tensor([7, 5]), {"beam_size": 3, "ctc_weight": ctc_weight, "candidates": candidates}

    def following(prefixes: Tensor, _: Tensor) -> Tensor:
        return table[prefixes.sum(dim=1) % 8 if prefixes.shape[1] > 1 else torch.zeros(len(prefixes)).long()]

    def shifted(prefixes: Tensor, utterances: Tensor) -> Tensor:
        before = torch.cat((torch.full((len(prefixes), 1), 3), prefixes[:, 1:] - 1), dim=1)
        return torch.nn.functional.pad(following(before, utterances), (1, 0), value=9.0)

    apart = torch.cat((ctc[..., 3:], ctc[..., :3], torch.full((2, 7, 1), -torch.inf)), dim=-1)
    expected = joint_beam(following, ctc, lengths, 3, **options)
    found = joint_beam(shifted, apart, lengths, 4, **options, blank_id=0)
    for one, other in zip(expected, found, strict=True):
        assert [tuple(token + 1 for token in each.tokens) for each in one] == [each.tokens for each in other]
        assert [each.score for each in one] == pytest.approx([each.score for each in other])
