"""From a path to a model: files, folders, and what is packed already."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_hybrid, tiny_model

from mpq.artifact.file import fixed_bytes, write_artifact
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.errors import MpqError
from mpq.loading import load_model, model_file, open_float_model, open_model
from mpq.models.base import AsrModel
from mpq.models.checkpoint import write_checkpoint
from mpq.quantization.spec import QuantSpec


def pack(path: Path, model: AsrModel) -> Path:
    """Writes an artifact of 8 bits a weight."""
    weight_format = WeightFormat(QuantSpec(8, rounding="nearest"))
    bits = dict.fromkeys((ref.name for ref in model.weights()), 8)
    size = fixed_bytes(model, weight_format) + sum(layer_bytes(ref.shape, 8, weight_format) for ref in model.weights())
    write_artifact(path, model, bits, weight_format, size)
    return path


def test_a_model_is_opened_with_its_file_and_fingerprint(tiny_archive: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", tiny_hybrid())
    for path, file, architecture in (
        (tiny_archive, tiny_archive, "conformer-ctc"),
        (tmp_path, tmp_path / "model.safetensors", "conformer-ctc-attention"),
    ):
        opened = open_float_model(path, "cpu", "measure")
        assert opened.path == file and not opened.model.training
        assert opened.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert opened.to_json() == {"path": str(file), "sha256": opened.sha256, "architecture": architecture}
        assert next(opened.model.parameters()).device == torch.device("cpu")


def test_what_is_packed_is_no_float_model(tmp_path: Path) -> None:
    path = pack(tmp_path / "packed.safetensors", tiny_model())
    assert open_model(path).model.quantized_bits == load_model(tmp_path).quantized_bits != {}
    with pytest.raises(MpqError) as caught:
        open_float_model(tmp_path, "cpu", "fine-tune")
    assert str(caught.value) == f"{path}: already packed; fine-tune the float checkpoint that it was made from"


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(MpqError, match=r"gone: no such file"):
        model_file(tmp_path / "gone")
    with pytest.raises(MpqError, match=r"a folder without model\.safetensors; expected a checkpoint folder"):
        model_file(tmp_path)
    for name in ("packed-b.safetensors", "packed-a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(MpqError, match=r"several packed files; name one of them, such as .*packed-a\.safetensors"):
        model_file(tmp_path)
    (tmp_path / "packed.safetensors").touch()
    assert model_file(tmp_path) == tmp_path / "packed.safetensors"
    (tmp_path / "run.json").touch()
    with pytest.raises(MpqError, match=r"a folder of `mpq run`; name the model in it, such as .*packed\.safetensors"):
        model_file(tmp_path)
    shutil.move(tmp_path / "packed.safetensors", tmp_path / "model.safetensors")
    assert model_file(str(tmp_path)) == tmp_path / "model.safetensors"
