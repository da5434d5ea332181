"""Greedy and prefix search of CTC against enumeration, torch and the algorithm written out."""

import math
from collections import defaultdict

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

from mpq.speech.ctc_search import ctc_greedy, ctc_prefix_beam
from mpq.speech.decoding import Hypothesis
from mpq.speech.joint_search import joint_beam


def test_greedy_merges_repeats_and_drops_blanks() -> None:
    path = torch.tensor([[0, 0, 2, 0, 1, 1, 2, 0]])
    assert ctc_greedy(torch.nn.functional.one_hot(path, 3), torch.tensor([7]), 2) == [[0, 0, 1]]


@pytest.mark.parametrize("seed", range(30))
def test_wide_prefix_beam_is_the_enumeration(seed: int) -> None:
    classes, frames, blank_id = 3 + seed % 2, 1 + seed % 5, seed % 3
    log_probs = random_log_probs(seed, frames, classes)
    exact = every_sequence(log_probs, blank_id)
    found = ctc_prefix_beam(log_probs[None], torch.tensor([frames]), blank_id, beam_size=len(exact) + 5)[0]
    expected = [Hypothesis(tokens, score) for tokens, score in exact.items()]
    assert_same(found, sorted(expected, key=lambda each: -each.score))


def test_prefix_beam_scores_are_torchs_ctc_loss() -> None:
    log_probs = random_log_probs(1, 2, 6, 4)
    lengths = torch.tensor([6, 4])
    for index, beam in enumerate(ctc_prefix_beam(log_probs, lengths, 3, beam_size=2000)):
        # All sequences of 3 tokens in at most 6 frames: none is lost, so the probabilities add up to one.
        assert math.fsum(math.exp(each.score) for each in beam) == pytest.approx(1, abs=1e-12)
        for tokens, score in [(each.tokens, each.score) for each in beam[:40] if each.tokens]:
            loss = torch.nn.functional.ctc_loss(
                log_probs[index, :, None],
                torch.tensor([tokens]),
                lengths[index : index + 1],
                torch.tensor([len(tokens)]),
                3,
                "sum",
            )
            assert score == pytest.approx(-loss.item(), abs=1e-9)


def reference_prefix_beam(log_probs: Tensor, blank_id: int, beam_size: int, candidates: int) -> list[Hypothesis]:
    """Hannun's algorithm with dictionaries and plain probabilities, for one (T, V) utterance."""
    beam = {(): (1.0, 0.0)}
    for row in log_probs.exp().tolist():
        likeliest = sorted((token for token in range(len(row)) if token != blank_id), key=lambda k: -row[k])
        following = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, nonblank) in beam.items():
            following[prefix][0] += (blank + nonblank) * row[blank_id]
            if prefix:
                following[prefix][1] += nonblank * row[prefix[-1]]
            for token in likeliest[:candidates]:
                before = blank if prefix and prefix[-1] == token else blank + nonblank
                following[(*prefix, token)][1] += before * row[token]
        beam = dict(sorted(following.items(), key=lambda item: -sum(item[1]))[:beam_size])
    return [Hypothesis(tokens, math.log(sum(p))) for tokens, p in beam.items()]


@pytest.mark.parametrize("beam_size", [1, 2, 3, 7])
@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_narrow_prefix_beam_is_hannuns(beam_size: int, candidates: int) -> None:
    log_probs = random_log_probs(beam_size, 20, 14, 5)
    options = {"beam_size": beam_size, "candidates": candidates}
    for found, frames in zip(ctc_prefix_beam(log_probs, torch.full((20,), 14), 2, **options), log_probs, strict=True):
        assert_same(found, reference_prefix_beam(frames, 2, **options))


def test_repeated_token_needs_a_blank_between() -> None:
    # One token (0) of probability 0.6 and a blank: 00, 0-, -0 and -- spell (0,) three times; (0, 0) needs 0-0.
    log_probs = torch.tensor([0.6, 0.4], dtype=torch.float64).log().expand(1, 3, 2)
    two, three = (ctc_prefix_beam(log_probs, torch.tensor([frames]), 1)[0] for frames in (2, 3))
    assert_same(two, [Hypothesis((0,), math.log(0.84)), Hypothesis((), math.log(0.16))])
    assert_same(
        three,
        [
            Hypothesis((0,), math.log(1 - 0.064 - 0.144)),
            Hypothesis((0, 0), math.log(0.6 * 0.4 * 0.6)),
            Hypothesis((), math.log(0.064)),
        ],
    )
    assert_same(joint_beam(toy_decoder(0, 2), log_probs, torch.tensor([3]), 1, ctc_weight=1.0)[0], three)


def test_prefix_beam_beats_greedy_where_alignments_add_up() -> None:
    # Graves et al. 2006, figure 2: the blank is likelier in both frames, the token in the sum over alignments.
    log_probs = torch.tensor([0.4, 0.6]).log().expand(1, 2, 2)
    assert ctc_greedy(log_probs, torch.tensor([2]), 1) == [[]]
    best = ctc_prefix_beam(log_probs, torch.tensor([2]), 1, beam_size=2)[0][0]
    assert best.tokens == (0,) and best.score == pytest.approx(math.log(0.64), abs=1e-7)


def test_prefix_beam_does_not_depend_on_the_batch() -> None:
    for options in ({"beam_size": 4}, {"beam_size": 3, "candidates": 2}):
        assert_batches_agree(lambda x, lengths, _, options=options: ctc_prefix_beam(x, lengths, 1, **options))


@pytest.mark.parametrize("candidates", [None, 2])
def test_ties_go_to_the_lower_tokens(candidates: int | None) -> None:
    uniform = torch.full((3, 4, 5), 0.2).log()
    lengths = torch.tensor([4, 2, 1])
    beams = ctc_prefix_beam(uniform, lengths, 4, beam_size=3, candidates=candidates)
    assert [each.tokens for each in beams[2]] == [(), (0,), (1,)]
    assert [each.tokens for each in beams[1]] == [(0,), (1,), ()]  # (0,) in three paths, () and (0, 1) in one

    def indifferent(prefixes: Tensor, utterances: Tensor) -> Tensor:
        return torch.full((len(prefixes), 5), 0.2).log()

    for weight in (0.0, 0.5, 1.0):
        beams = joint_beam(indifferent, uniform, lengths, 4, 3, weight, candidates=candidates)
        assert [each.tokens for each in beams[2]] == [(), (0,), (1,)]
        again = joint_beam(indifferent, uniform.flip(0), lengths.flip(0), 4, 3, weight, candidates=candidates)
        assert [[each.tokens for each in beam] for beam in again[::-1]] == [[e.tokens for e in beam] for beam in beams]
    beams = joint_beam(indifferent, uniform, lengths, 4, 4, 0.0, 10.0, 2, candidates)
    expected = [(0, 0), (0, 1), (1, 0), (1, 1)] if candidates else [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [each.tokens for each in beams[0]] == expected


def test_rounding_noise_decides_nothing() -> None:
    third = 0.3, 0.1 + 0.2  # the second is larger by one unit in the last place
    log_probs = torch.tensor([[[-third[1], -third[0], -5.0]]], dtype=torch.float64)
    one = torch.tensor([1])
    assert ctc_prefix_beam(log_probs, one, 2, beam_size=1)[0][0].tokens == (0,)
    assert [each.tokens for each in ctc_prefix_beam(log_probs, one, 2, beam_size=2)[0]] == [(0,), (1,)]
    assert ctc_prefix_beam(log_probs, one, 2, candidates=1)[0][0].tokens == (0,)
    for weight in (0.0, 0.5, 1.0):
        found = joint_beam(lambda p, u: log_probs[0].expand(len(p), 3), log_probs, one, 2, 2, weight)[0]
        assert [each.tokens for each in found] == [(0,), (1,)]


def test_impossible_tokens_are_never_found() -> None:
    log_probs = random_log_probs(3, 1, 5, 4)
    log_probs[:, :, 1] = -INF
    log_probs[:, 2, :3] = -INF  # frame 2 is a certain blank
    log_probs[:, 4, 3] = -INF  # and frame 4 no blank
    log_probs = log_probs.log_softmax(-1)
    exact = every_sequence(log_probs[0], 3)
    expected = sorted((Hypothesis(*item) for item in exact.items()), key=lambda each: -each.score)
    assert_same(ctc_prefix_beam(log_probs, torch.tensor([5]), 3, beam_size=200)[0], expected)
    assert_same(joint_beam(toy_decoder(0, 4), log_probs, torch.tensor([5]), 3, 200, 1.0)[0], expected)
    decoder = toy_decoder(0, 4)
    found = joint_beam(decoder, log_probs, torch.tensor([5]), 3, 400, 0.4)[0]
    assert_same(found, every_joint(decoder, log_probs[0], 0, 0.4, 0.0, 5))
    assert set(exact) == {each.tokens for each in found}


@pytest.mark.parametrize("dead", [0, 2])
def test_frames_that_allow_nothing_give_the_empty_hypothesis(dead: int) -> None:
    log_probs = random_log_probs(3, 2, 4, 3)
    log_probs[0, dead] = -INF
    lengths = torch.tensor([4, 4])
    for beams in (ctc_prefix_beam(log_probs, lengths, 2), joint_beam(toy_decoder(0, 3), log_probs, lengths, 2)):
        assert beams[0] == [Hypothesis((), -INF)]
        assert len(beams[1]) > 1 and beams[1][0].score > -INF
