"""The candidates of a search: the paper's, those of a trained model, per block, and what are no candidates."""

from typing import Any

import pytest

from mpq.config import SearchConfig
from mpq.errors import MpqError
from mpq.search.space import ModuleSpace, SearchSpace, candidate_faults, search_space

OWN = [((4096, 0), (4096, 0))] * 2
SMALL = [((40, 0), (30, 0)), ((20, 4), (30, 8))]


def found(own: list = OWN, inputs: int = 256, is_trained: bool = False, **options: Any) -> SearchSpace:
    return search_space(SearchConfig(**options), own, inputs, is_trained)


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_papers_candidates(is_trained: bool) -> None:
    """Those of a trained model of the paper's sizes are the same."""
    widths, ranks = tuple(range(1024, 4097, 128)), tuple(range(80, 241, 20))
    assert (len(widths), len(ranks)) == (25, 9)
    expected = {
        "widths": ModuleSpace(widths, (0,)),
        "ranks": ModuleSpace((4096,), ranks),
        "both": ModuleSpace((1024, 1536, 2048, 2560, 3072, 3584, 4096), (120, 160, 200, 240)),
    }
    for space, module in expected.items():
        modules = found(space=space, is_trained=is_trained)
        assert modules == [(module, module)] * 2
    assert expected["both"].largest == (4096, 240) and expected["widths"].largest == (4096, 0)


def test_of_a_trained_model_parts_of_each_module() -> None:
    modules = found(SMALL, 16, True)
    assert len(modules[0][0].widths) == 25 and len(modules[1][0].widths) == 16  # every width from 5 to 20
    for (space, other), (shape, second) in zip(modules, SMALL, strict=True):
        for one, (width, rank) in ((space, shape), (other, second)):
            assert one.widths[0] == round(width / 4) and one.largest == (width, rank)
            assert list(one.widths) == sorted(set(one.widths)) and len(one.widths) <= 25
    ranks = found(SMALL, 16, True, space="ranks")
    for one, (width, _) in zip((m for b in ranks for m in b), (s for b in SMALL for s in b), strict=True):
        most = one.ranks[-1]  # the rank from which on factors of 16 x width have more weights than the matrix
        assert most * (16 + width) <= 16 * width < (most + 1) * (16 + width)
        assert one.ranks[0] == round(most / 3) and list(one.ranks) == sorted(set(one.ranks)) and len(one.ranks) <= 9
    assert [[one.widths for one in block] for block in ranks] == [[(40,), (30,)], [(20,), (30,)]]


def test_tiny_modules_have_fewer_candidates() -> None:
    (module, _), *_ = found([((3, 0), (3, 0))], 2, True)
    assert module.widths == (1, 2, 3)
    (module, _), *_ = found([((1, 0), (1, 0))], 1, True)
    assert module.widths == (1,)


def test_what_the_user_says_for_each_block_and_module() -> None:
    flat = found(SMALL, 16, True, ffn_width=[5, 20])
    assert flat == [(ModuleSpace((5, 20), (rank,)), ModuleSpace((5, 20), (rank2,))) for rank, rank2 in ((0, 0), (4, 8))]
    second = found(SMALL, 16, True, ffn_width=[5, 20], ffn2_width=[7, 8, 9])
    assert [[one.widths for one in block] for block in second] == [[(5, 20), (7, 8, 9)]] * 2
    each = found(SMALL, 16, True, ffn_width=[[5, 40], [3]], ffn2_width=[30])
    assert [[one.widths for one in block] for block in each] == [[(5, 40), (30,)], [(3,), (30,)]]
    only_second = found(SMALL, 16, True, ffn2_width=[7])
    assert only_second[0][1].widths == (7,) and only_second[0][0].largest == (40, 0)
    ranks = found(SMALL, 16, False, space="both", ffn_width=[40, 80], ffn_rank=[2, 3], ffn2_rank=[[1], [4]])
    assert [[(one.widths, one.ranks) for one in block] for block in ranks] == [
        [((40, 80), (2, 3)), ((40, 80), (1,))],
        [((40, 80), (2, 3)), ((40, 80), (4,))],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn_width": [8, 41]}, "ffn_width: expected candidates up to 40, the width of block 1's first module, got"),
        (
            {"ffn_width": [8], "ffn2_width": [[8], [31]]},
            "ffn2_width: expected candidates up to 30, the width of block 2's second module, got 31",
        ),
        (
            {"space": "ranks", "ffn_rank": [4, 17]},
            "ffn_rank: expected ranks up to 16, the smaller side of block 1's first module, got 17",
        ),
        (
            {"space": "both", "ffn_width": [4, 9], "ffn_rank": [4, 10]},
            "ffn_rank: expected ranks up to 9, the smaller side of block 1's first module, got 10",
        ),
        ({"ffn_width": []}, r"ffn_width: expected rising candidates, one or more, got \[\]"),
        ({"ffn_width": [[4], []]}, r"ffn_width: expected rising candidates, one or more, got \[\[4\], \[\]\]"),
        ({"ffn_width": [4, 4]}, r"ffn_width: expected rising candidates, one or more, got \[4, 4\]"),
        ({"ffn2_width": [5, 4]}, r"ffn2_width: expected rising candidates, one or more, got \[5, 4\]"),
        ({"ffn_width": [[4]]}, "ffn_width: expected one list for each of the 2 blocks, got 1"),
    ],
)  # fmt: skip
def test_no_candidates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MpqError, match=rf"^\[search\] {message}"):
        found(SMALL, 16, True, **options)


def test_an_untrained_model_may_be_wider_than_it_was() -> None:
    assert found(SMALL, 16, False, ffn_width=[8, 41])[0][0].largest == (41, 0)
    with pytest.raises(MpqError, match="ffn_rank: expected ranks up to 16, the smaller side"):
        found(SMALL, 16, False, space="ranks")


def test_candidates_of_what_is_not_searched_do_nothing() -> None:
    given = {"ffn_width": [5, 20], "ffn_rank": [2, 3]}
    for space in ("widths", "ranks"):
        other = {key: value for key, value in given.items() if key == f"ffn_{space[:-1]}"}
        assert found(SMALL, 16, True, space=space, **given) == found(SMALL, 16, True, space=space, **other)


def test_faults_that_need_no_model() -> None:
    """How many blocks there are may not be known."""
    config = SearchConfig(ffn_width=[[4]], ffn_rank=[2, 2], ffn2_width=[3, 2])
    assert [key for key, _ in candidate_faults(config, None)] == ["ffn2_width", "ffn_rank"]
    assert [key for key, _ in candidate_faults(config, 2)] == ["ffn_width", "ffn2_width", "ffn_rank"]
    assert candidate_faults(SearchConfig(), 2) == []
    with pytest.raises(MpqError) as caught:
        search_space(config, SMALL, 16, True)
    assert len(str(caught.value).splitlines()) == 3
