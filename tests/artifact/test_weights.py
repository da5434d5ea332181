"""How a weight is stored: its bytes by hand, and what JSON and options say of it; test_file.py has the way back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.artifact.weights import (
    Cursor,
    WeightFormat,
    decode,
    encode,
    layer_bytes,
    layer_length,
    quantize_layer,
    quantize_weight,
    take_layer,
)
from mpq.errors import MpqError
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import SCHEMES, QuantSpec


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 8),
    st.sampled_from(["symmetric", "asymmetric", "mulaw"]),
    st.sampled_from(["tensor", "channel", "group:3", "group:64"]),
)
def test_layer_bytes_by_hand(shape: list[int], bits: int, scheme: str, granularity: str) -> None:
    numel, rows = int(np.prod(shape)), shape[0] if len(shape) > 1 else 1
    columns = numel // rows
    groups = {
        "tensor": 1,
        "channel": rows,
        "group:3": rows * -(-columns // 3),
        "group:64": rows * -(-columns // 64),
    }[granularity]
    codes = -(-numel // 5) if (bits, scheme) == (2, "symmetric") else -(-numel * bits // 8)
    zero_points = -(-groups * bits // 8) if scheme == "asymmetric" else 0
    centroids = 2**bits if scheme == "mulaw" else 0
    expected = codes + zero_points + centroids + 2 * groups
    assert layer_bytes(tuple(shape), bits, WeightFormat(QuantSpec(8, scheme, granularity))) == expected
    assert layer_bytes(tuple(shape), 16, WeightFormat(QuantSpec(8))) == 2 * numel


def test_quantizer_of_a_file_from_elsewhere() -> None:
    assert WeightFormat.from_json({}) == WeightFormat(QuantSpec(8))
    assert WeightFormat.from_json({"scheme": "symmetric"}).spec.scheme == "symmetric"
    with pytest.raises(MpqError, match="unknown key 'schema'"):
        WeightFormat.from_json({"schema": "symmetric"})
    with pytest.raises(MpqError, match="rest_dtype"):
        WeightFormat.from_json({"rest_dtype": "int8"})
    json.dumps(WeightFormat(QuantSpec(8)).to_json())


def test_the_rounding_that_was_not_asked_for() -> None:
    for options, has_data, rounding in (
        ({}, True, "gptq"),
        ({}, False, "nearest"),
        ({"scheme": "symmetric"}, True, "gptq"),
        ({"scheme": "mulaw"}, True, "nearest"),
        ({"rounding": "nearest"}, True, "nearest"),
        ({"rounding": "gptq"}, False, "gptq"),
    ):
        assert WeightFormat.from_options(options, has_data).spec.rounding == rounding
    with pytest.raises(MpqError, match="use --rounding nearest"):
        WeightFormat.from_options({"scheme": "mulaw", "rounding": "gptq"})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_what_was_quantized(scheme: str) -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    weight_format = WeightFormat(QuantSpec(8, scheme, "" if SCHEMES[scheme].only else "group:7"))
    widths = range(1, 9)
    given_back = quantize_layer("w", weight, weight_format, widths, {})
    for bits, one, values in zip(
        widths, quantize_weight("w", weight, weight_format, widths, {}), given_back, strict=True
    ):
        encoded = encode(one, bits, weight_format)
        data = take_layer(Cursor(encoded), (3, 20), bits, weight_format)
        if not SCHEMES[scheme].is_entropy_coded:
            assert len(encoded) == layer_bytes((3, 20), bits, weight_format)
        assert layer_length(data, bits, weight_format) == len(encoded)
        assert torch.equal(decode(data, (3, 20), bits, weight_format), values)
        assert torch.equal(values, fake_quantize(weight, replace(weight_format.spec, bits=bits)))


def test_faults_name_the_weight_and_the_remedy() -> None:
    with pytest.raises(MpqError, match=r"w: no calibration data reached it, .* use --rounding nearest"):
        quantize_layer("w", torch.ones(2, 2), WeightFormat(QuantSpec(8, rounding="gptq")), [4], {})
    with pytest.raises(MpqError, match=r"^w: .*finite"):
        quantize_layer("w", torch.full((2, 2), torch.nan), WeightFormat(QuantSpec(8)), [4], {})
    with pytest.raises(MpqError, match="shorter than the manifest says"):
        Cursor(b"abc").take(4)
