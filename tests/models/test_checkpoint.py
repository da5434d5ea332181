"""The checkpoint of mpq's own models: a round trip, and files that are no whole checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_hybrid

from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.checkpoint import is_checkpoint, read_checkpoint, write_checkpoint
from mpq.models.hybrid import HybridConformer
from mpq.training.record import average_weights


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
@pytest.mark.parametrize("options", [{}, {"decoder_layers": 0}, {"conv_norm": "layer_norm"}])
def test_round_trip(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_hybrid(kind, **options)
    write_checkpoint(tmp_path / "model.safetensors", model.train())
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_model(path)
        assert isinstance(found, HybridConformer) and not any(module.training for module in found.modules())
        assert found.to_config() == model.to_config()
        state = found.state_dict()
        for name, tensor in model.state_dict().items():
            if "num_batches" not in name:
                assert torch.equal(state[name], tensor), name
        assert found.tokenizer.encode("bed cab") == model.tokenizer.encode("bed cab")
    waveforms = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6000, 4000])
    model.eval()
    for one, other in zip(model.features(waveforms, lengths), found.features(waveforms, lengths), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        outputs = [each.encode(*each.features(waveforms, lengths))[0] for each in (model, found)]
    assert torch.equal(*outputs)


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, tiny_hybrid())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model.safetensors", tiny_hybrid("bpe"))
    return tmp_path / "model.safetensors"


def changed(file: Path, path: Path, change: Any = None, tensors: Any = None, metadata: Any = ...) -> Path:
    """Writes the file anew with its record or its tensors changed."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        record = json.loads(opened.metadata()["mpq"])
    state = load_file(file)
    if change:
        change(record)
    if tensors:
        tensors(state)
    save_file(state, path, {"mpq": json.dumps(record)} if metadata is ... else metadata)
    return path


def refused(path: Path, pattern: str) -> None:
    """One line that has the file's name and says what is wrong."""
    for read in (load_model, read_checkpoint):
        with pytest.raises(MpqError) as error:
            read(path)
        text = str(error.value)
        assert text.startswith(f"{path}: ") and "\n" not in text
    assert re.search(pattern, text), text


@pytest.mark.parametrize("kept", [0, 5, 200, 0.3, 0.999])
def test_a_file_that_was_cut(kept: float, file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "cut").write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    refused(tmp_path / "cut", "not a whole checkpoint of mpq")


def test_another_version(file: Path, tmp_path: Path) -> None:
    def later(record: dict[str, Any]) -> None:
        record["format"] = "mpq.checkpoint/2"

    path = changed(file, tmp_path / "later", later)
    assert is_checkpoint(path)
    refused(path, r'expected "mpq\.checkpoint/1", got "mpq\.checkpoint/2"; update mpq')


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_weights_of_another_program(metadata: dict[str, str] | None, file: Path, tmp_path: Path) -> None:
    path = changed(file, tmp_path / "other.safetensors", metadata=metadata)
    assert not is_checkpoint(path)
    refused(path, "no metadata of mpq")
    with pytest.raises(MpqError) as error:
        load_model(path)
    assert "safetensors" in str(error.value) and "'NoneType'" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "pattern"),
    [
        (lambda state: state.pop("ctc.bias"), "tensor ctc.bias is missing"),
        (lambda state: state.pop("tokenizer"), "tokenizer"),
        (lambda state: state.update(more=torch.zeros(1)), "tensor more .* has no place"),
        (lambda state: state.update({"ctc.bias": torch.zeros(3)}), r"tensor ctc\.bias: expected shape \(10,\)"),
        (lambda state: state["ctc.bias"].fill_(float("nan")), "tensor ctc.bias has values that are not finite"),
        (lambda state: state["tokenizer"].fill_(7), "."),
        (lambda state: state.update(tokenizer=torch.zeros(0, dtype=torch.uint8)), "."),
        (lambda state: state.update(tokenizer=state["tokenizer"][:50].clone()), "."),
    ],
)
def test_spoilt_tensors(tensors: Any, pattern: str, file: Path, tmp_path: Path) -> None:
    refused(changed(file, tmp_path / "spoilt", tensors=tensors), pattern)


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [before] if before else []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += paths(inner, (*before, key))
    return found


def test_any_spoilt_record_is_an_error_of_one_line_or_a_model(file: Path, tmp_path: Path) -> None:
    """Each value in turn is missing, of another type, or absurd."""
    record = {"format": "mpq.checkpoint/1", "model": tiny_hybrid("bpe").to_config()[0]}
    refusals = 0
    for path in paths(record):
        for value in (..., None, 0, "x"):

            def spoil(target: dict[str, Any], path: tuple[Any, ...] = path, value: Any = value) -> None:
                for key in path[:-1]:
                    target = target[key]
                target.pop(path[-1]) if value is ... else target.update({path[-1]: value})

            try:
                read_checkpoint(changed(file, tmp_path / "spoilt", spoil))
            except MpqError as error:
                refusals += 1
                assert "\n" not in str(error), (path, value)
    assert refusals > 80


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(MpqError, match=r"a folder without model\.safetensors; expected a checkpoint folder"):
        load_model(tmp_path)
    with pytest.raises(MpqError, match="no such file"):
        load_model(tmp_path / "gone")


def test_the_average_of_several(tmp_path: Path) -> None:
    models = [tiny_hybrid(seed=seed) for seed in range(3)]
    for index, model in enumerate(models):
        write_checkpoint(tmp_path / f"{index}", model)
    average = average_weights([tmp_path / f"{index}" for index in range(3)])
    states = [model.state_dict() for model in models]
    assert average.keys() == {name for name in states[0] if "num_batches" not in name}
    for name, tensor in average.items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor, expected.float())
        assert tensor.dtype == torch.float32
    assert not torch.equal(average["encoder.layers.0.conv.batch_norm.running_var"], torch.ones(16))
