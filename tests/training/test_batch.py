"""A batch as the model sees it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TEXTS, recipe, write_speech

from mpq.training import weights as weight_loop
from mpq.training.run import train


def test_pitch_is_masked_with_whole_frames_alone(tmp_path: Path) -> None:
    write_speech(tmp_path, TEXTS[:2])
    changes = {"features__pitch": True, "data__dev": None, "train__select": "last", "augment__time_mask_fraction": 0.5}
    with_pitch = recipe(tmp_path, **changes, augment__frequency_masks=2, augment__frequency_mask_width=20)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = weight_loop.WeightTrainer._masked

    def watched(self: Any, features: Any, frames: Any, items: Any) -> Any:
        found = plain(self, features, frames, items)
        seen.append((features, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_loop.WeightTrainer, "_masked", watched)
        train(with_pitch, tmp_path / "out", quiet=True)
    banded = whole = 0
    for before, after in seen:
        masked = (before != 0) & (after == 0)
        bands, pitch = masked[..., :20], masked[..., 20:]
        is_whole = bands.sum(-1) == (before[..., :20] != 0).sum(-1)
        assert not pitch[~is_whole].any()
        banded += int((bands.any(-1) & ~is_whole).sum())
        whole += int((pitch.any(-1) & is_whole).sum())
    assert banded > 0 and whole > 0
