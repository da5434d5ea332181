"""The record of a fine-tuning is the same after it was written and read."""

import json
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.finetuning.record import FinetunedSize, FinetuneResult
from mpq.training.record import EpochResult

SIZES = (
    FinetunedSize("four.json", "out/four.safetensors", 1000, 4.0, 7.5, 0.3, 0.25, 0.1, 0.2, ((0.3, 0.25), (0.1, 0.2))),
    FinetunedSize("two.json", "out/two.safetensors", 600, 2.0, 12.5, 0.9, None, 0.4, None, ((0.9, None), (0.4, None))),
)
EPOCHS = (EpochResult(0, 0, None, 0.6, None, 1.0), EpochResult(1, 12, 0.5, 0.25, None, 2.0))
RESULT = FinetuneResult(
    "f", {"path": "model.nemo", "sha256": "s"}, SIZES, EPOCHS, (1,), 10, 0.5, 8, 1, 0, 7, 3.0, "cpu", 2, {"seed": 7}
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "finetune.json").write_text(json.dumps(RESULT.to_json()))
    assert FinetuneResult.load(tmp_path / "finetune.json") == RESULT


def test_the_keys_of_the_file_are_fixed() -> None:
    assert list(json.loads(json.dumps(RESULT.to_json()))) == [
        "format", "fingerprint", "checkpoint", "sizes", "epochs", "averaged", "utterances", "hours", "transcribed",
        "skipped", "too_long", "seed", "seconds", "device", "processes", "inputs",
    ]  # fmt: skip


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "finetune.json").write_text(json.dumps(RESULT.to_json() | {"format": "mpq.training/1"}))
    with pytest.raises(MpqError, match=r"finetune\.json: "):
        FinetuneResult.load(tmp_path / "finetune.json")
