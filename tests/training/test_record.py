"""Epochs by rank."""

from mpq.training.record import EpochResult, rank_epochs


def test_ranks() -> None:
    epochs = [
        EpochResult(index + 1, 0, 0.0, loss, wer, 0.0) for index, (loss, wer) in enumerate([(3, 1), (1, 2), (1, 1)])
    ]
    assert [one.epoch for one in rank_epochs(epochs, "wer")] == [3, 1, 2]
    assert [one.epoch for one in rank_epochs(epochs, "loss")] == [2, 3, 1]
    assert [one.epoch for one in rank_epochs(epochs, "last")] == [3, 2, 1]


def test_a_loss_that_is_none_ranks_last_among_equals() -> None:
    epochs = [EpochResult(1, 0, 0.0, None, 1, 0.0), EpochResult(2, 0, 0.0, 5.0, 1, 0.0)]
    assert [one.epoch for one in rank_epochs(epochs, "wer")] == [2, 1]
