"""Fine-tuning: the weights in the file are those that were trained; sizes, choices of epochs, averages, schedules."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_finetune import NEAREST, Spy, assert_holds, tune, tuning_recipe, write_allocation, write_hybrid
from tiny_training import write_speech

from mpq.models import load_model
from mpq.quantizers import QuantSpec, fake_quantize
from mpq.records import Allocation
from mpq.storage import Storage


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, dev.jsonl and the checkpoint `hybrid`."""
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder, ("abc", "bad", "deed", "bed cab"))
    write_speech(folder, ("abed", "a bee"), "dev.jsonl")
    write_hybrid(folder)
    return folder


def mixed_bits(name: str) -> int:
    """Widths of all kinds, and two layers left unquantized."""
    if name in ("encoder.pre_encode.conv.0.weight", "decoder.embedding.weight") or name.endswith("linear_pos.weight"):
        return 16
    return (2, 3, 4, 8)[len(name) % 4]


SCHEMES = [("asymmetric", "learned"), ("asymmetric", "recomputed"), ("symmetric", "frozen"), ("mulaw", "learned")]


@pytest.mark.parametrize(("scheme", "scales"), SCHEMES)
def test_the_trained_weights_are_in_the_file_bit_for_bit(
    scheme: str, scales: str, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(QuantSpec(8, scheme, "channel" if scheme == "mulaw" else "group:8", rounding="nearest"))
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", mixed_bits, storage)
    spy = Spy().watch(monkeypatch)
    recipe = tuning_recipe(speech / "train.jsonl", speech / "dev.jsonl", scales=scales, search_every=3)
    result = tune(speech / "hybrid", path, recipe, tmp_path / "out")
    (size,) = result.sizes
    packed = tmp_path / "out/packed.safetensors"
    assert size.size_bytes == os.path.getsize(packed) == Allocation.load(path).predicted_bytes
    (seen,) = spy.seen[2]
    assert_holds(packed, seen)
    assert_holds(tmp_path / "out", seen)
    before = load_model(speech / "hybrid").state_dict()
    bits = load_model(packed).quantized_bits
    assert 16 in bits.values() and bits == {name: mixed_bits(name) for name in bits}
    moved = 0
    for name, weight in seen.items():
        if bits[name] != 16:
            start = fake_quantize(before[name], replace(storage.spec, bits=bits[name]))
            moved += int((start != weight).sum())
    assert moved > 300  # the training did something
