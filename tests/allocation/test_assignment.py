"""An allocation applied to a model: the size of its file, and which audio and statistics belong to it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from mpq.allocation.assignment import Assignment, assign, planned_bytes, recall, recalled_statistics
from mpq.allocation.records import Allocation
from mpq.artifact.file import write_artifact
from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.statistics import input_grams, input_statistics

FORMAT = WeightFormat(QuantSpec(8))
GPTQ = WeightFormat(QuantSpec(8, rounding="gptq"))
OUT = Path("small.safetensors")


def allocation_of(bits: dict[str, int], size: int, **values) -> Allocation:
    options = {"predicted_kl": 0.0, "average_bits": 4.0, "frontier": ()} | values
    return Allocation(bits=bits, target_bytes=size, predicted_bytes=size, **options)


def test_the_planned_size_is_that_of_the_file(tmp_path: Path) -> None:
    model = tiny_model()
    widths = {ref.name: (2, 4, 8, 16)[index % 4] for index, ref in enumerate(model.weights())}
    size = planned_bytes(model, widths, FORMAT)
    write_artifact(tmp_path / "m", model, widths, FORMAT, size, {}, lambda _: None)
    assert (tmp_path / "m").stat().st_size == size
    found = assign(model, Path("m.nemo"), "abc", allocation_of(widths, size), FORMAT, OUT)
    assert found == Assignment(widths, FORMAT, size)


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model()
    widths = {ref.name: 4 for ref in model.weights()}
    size = planned_bytes(model, widths, FORMAT)
    other = allocation_of(widths, size, model={"sha256": "abd", "path": "other.nemo"})
    with pytest.raises(MpqError, match=r"m\.nemo: the allocation was made for another checkpoint, other\.nemo"):
        assign(model, Path("m.nemo"), "abc", other, FORMAT, OUT)
    assert assign(model, Path("m.nemo"), "abd", other, FORMAT, OUT).size_bytes == size
    small = replace(allocation_of(widths, size), predicted_bytes=0, target_bytes=size - 1)
    with pytest.raises(MpqError, match=rf"small\.safetensors: the file would have {size} bytes, above"):
        assign(model, Path("m.nemo"), "abc", small, FORMAT, OUT)
    del widths[next(iter(widths))]
    with pytest.raises(MpqError, match="no bit-width for"):
        planned_bytes(model, widths, FORMAT)


@pytest.mark.parametrize(
    "weight_format, bits, needed", [(FORMAT, [4, 4], False), (GPTQ, [4, 16], True), (GPTQ, [16, 32], False)]
)
def test_statistics_are_needed_where_something_is_rounded_by_them(
    weight_format: WeightFormat, bits: list[int], needed: bool
) -> None:
    widths = {str(index): width for index, width in enumerate(bits)}
    assert Assignment(widths, weight_format, 1).needs_statistics is needed


def test_the_audio_is_recalled_or_the_reason_given(tmp_path: Path, tiny_manifest: Path) -> None:
    model = tiny_model()
    drawn = draw(model, tiny_manifest, 1.0)
    made = allocation_of({}, 1, data=drawn.to_json())
    found, note = recall(model, made, None)
    assert found is not None and found.sha256 == drawn.sha256 and note == ""
    assert recall(model, allocation_of({}, 1), None) == (None, "no calibration data are known; --data names some")
    moved = replace(made, data=made.data | {"path": str(tmp_path / "gone.jsonl")})
    found, note = recall(model, moved, None)
    assert found is None and "gone.jsonl" in note and note.endswith("; --data says where they are now")
    found, _ = recall(model, moved, tiny_manifest)
    assert found is not None and found.sha256 == drawn.sha256
    with pytest.raises(MpqError, match="not the audio"):
        recall(model, replace(made, data=made.data | {"sha256": "0"}), tiny_manifest)


def test_statistics_come_from_the_audio_or_the_cache(
    tmp_path: Path, tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    model = tiny_model()
    drawn = draw(model, tiny_manifest, 1.0)
    made, sha256 = allocation_of({}, 1, data=drawn.to_json()), hashlib.sha256(b"model").hexdigest()
    with pytest.raises(MpqError, match=r"small\.safetensors: rounding gptq needs calibration data: nothing there"):
        recalled_statistics(model, sha256, None, made, GPTQ, "nothing there", OUT, True)
    expected = input_grams(model, one_by_one(model, drawn))
    collected = recalled_statistics(model, sha256, drawn, None, GPTQ, "", OUT, True)
    cached = recalled_statistics(model, sha256, None, made, GPTQ, "", OUT, True)
    for grams in (collected, cached, input_statistics(model, sha256, drawn, GPTQ)):
        assert set(grams) == set(expected) and all(torch.equal(grams[name], expected[name]) for name in expected)
    with pytest.raises(MpqError, match="needs calibration data"):
        recalled_statistics(model, sha256, None, None, GPTQ, "", OUT, True)
