"""The bytes of layers, counted while they are rounded."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from mpq.artifact import sizes as module
from mpq.artifact.file import write_artifact
from mpq.artifact.sizes import LayerSizes, file_bytes
from mpq.artifact.weights import WeightFormat, encode, quantize_weight
from mpq.quantization.spec import SCHEMES, QuantSpec


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("at_once", [1, 1000, 2**22])
def test_bytes_are_those_of_the_file(scheme: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    weight_format = WeightFormat(QuantSpec(8, scheme))
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{rows}": torch.randn(rows, 30, generator=generator) for rows in (1, 20, 33)}
    sizes, expected = LayerSizes(weight_format), {}
    for name, weight in weights.items():
        stored = quantize_weight(name, weight, weight_format, [2, 3, 6], {})
        sizes.add(name, [2, 3, 6], stored)
        expected |= {
            (name, width): len(encode(one, width, weight_format)) for width, one in zip((2, 3, 6), stored, strict=True)
        }
    assert sizes.bytes() == expected == sizes.bytes()
    assert all(sizes.bytes()[name, 2] < sizes.bytes()[name, 6] for name in weights)


@pytest.mark.parametrize("scheme", ["entropy", "asymmetric", "mulaw"])
def test_file_bytes_are_those_of_a_file_without_a_promise(scheme: str, tmp_path: Path) -> None:
    model, weight_format = tiny_model(), WeightFormat(QuantSpec(8, scheme))
    bits = {ref.name: (2, 3, 4, 16)[index % 4] for index, ref in enumerate(model.weights())}
    state = model.state_dict()
    stored = {
        name: quantize_weight(name, state[name], weight_format, [width], {})[0]
        for name, width in bits.items()
        if width != 16
    }
    write_artifact(tmp_path / "m", model, bits, weight_format, None)
    assert file_bytes(model, bits, weight_format, stored) == os.path.getsize(tmp_path / "m")


def test_nothing_was_rounded() -> None:
    assert LayerSizes(WeightFormat(QuantSpec(8, "entropy"))).bytes() == {}
