"""The sections of training loops: what fine-tuning changes of them, and the borders of their values."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from mpq.config import (
    AugmentConfig,
    FinetuneAugmentConfig,
    FinetuneConfig,
    LoopConfig,
    Recipe,
    TrainConfig,
)


def test_fine_tuning_masks_nothing_unless_it_is_asked_to() -> None:
    plain, fine = AugmentConfig().model_dump(), FinetuneAugmentConfig().model_dump()
    assert {key: fine[key] for key in fine if fine[key] != plain[key]} == {"frequency_masks": 0, "time_masks": 0}


def test_every_loop_has_the_options_of_all() -> None:
    for section in (TrainConfig, FinetuneConfig):
        assert set(LoopConfig.model_fields) < set(section.model_fields)
    plain, train = LoopConfig().model_dump(), TrainConfig().model_dump()
    assert {key: train[key] for key in plain} == plain


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("train", {"betas": [0.9, 1.0]}),
        ("train", {"betas": [0.9]}),
        ("train", {"semi_orthogonal": "SLX"}),
        ("train", {"label_smoothing": 1.0}),
        ("train", {"save_minutes": 0}),
        ("augment", {"speed": [0.49]}),
        ("augment", {"noise": [""]}),
        ("search", {"temperature": [1.0, 0.0]}),
        ("search", {"ffn_width": [0]}),
        ("search", {"eta": -1.0}),
        ("finetune", {"alpha": [0.0, 500.0]}),
        ("finetune", {"anneal": [0.0, 1.1]}),
        ("finetune", {"transcript_weight": 1.1}),
        ("finetune", {"ema": 1.0}),
    ],
)
def test_values_beyond_their_borders_are_refused(section: str, table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate_json(json.dumps({section: table}))
    assert caught.value.errors()[0]["loc"][:2] == (section, *table)
