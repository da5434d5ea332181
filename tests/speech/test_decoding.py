"""The searches against all V^T paths, torch's CTC loss, and all label sequences with a toy decoder."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.speech.ctc_search import ctc_greedy, ctc_prefix_beam
from mpq.speech.decoding import Hypothesis
from mpq.speech.joint_search import joint_beam

INF = float("inf")
Decoder = Callable[[Tensor, Tensor], Tensor]


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
