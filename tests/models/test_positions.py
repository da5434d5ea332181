"""The sinusoids of positions by hand."""

import numpy as np
import torch

from mpq.models.positions import sinusoids


def test_relative_positions_by_hand() -> None:
    table = sinusoids(torch.arange(2, -3, -1), 4)
    assert table.shape == (5, 4)
    for row, position in zip(table.tolist(), (2, 1, 0, -1, -2), strict=True):
        expected = [np.sin(position), np.cos(position), np.sin(position / 100), np.cos(position / 100)]
        np.testing.assert_allclose(row, expected, atol=1e-6)
