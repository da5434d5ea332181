"""Options of a search, and how ties are broken."""

import pytest
import torch

from mpq.errors import MpqError
from mpq.speech.decoding import DecodeOptions, Hypothesis, best, largest


@pytest.mark.parametrize(
    "option, words",
    [
        ({"method": "beam"}, "decode: method: expected greedy, prefix, joint, got 'beam'"),
        ({"beam_size": 0}, "decode: beam_size: expected 1 or more, got 0"),
        ({"length_bonus": float("inf")}, "decode: length_bonus: expected a finite number, got inf"),
        ({"ctc_weight": 1.5}, "decode: ctc_weight: expected 0 to 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(option: dict, words: str) -> None:
    with pytest.raises(MpqError, match=words):
        DecodeOptions(**option)


def test_the_largest_values_and_ties() -> None:
    """Values that agree to nine decimals are a tie; the lower index is taken, and indices ascend."""
    values = torch.tensor([[1.0, 3.0, 3.0 + 1e-12, 2.0], [0.0, 0.0, 0.0, -1.0]], dtype=torch.float64)
    assert largest(values, 1).tolist() == [[1], [0]]
    assert largest(values, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert largest(values, 9).tolist() == [[0, 1, 2, 3]] * 2


def test_the_best_hypotheses_and_ties() -> None:
    one, two, three = Hypothesis((2,), -1.0), Hypothesis((1, 5), -1.0 - 1e-12), Hypothesis((), -0.5)
    assert best([one, two, three], 2) == [three, two]
    assert best([], 3) == [Hypothesis((), -float("inf"))]
