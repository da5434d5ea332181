"""A new scheme, and a new rounding, are a record and their mathematics: nothing else has to know of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from mpq.artifact.file import fixed_bytes, read_artifact, write_artifact
from mpq.artifact.weights import WeightFormat, layer_bytes, quantize_layer
from mpq.cli.options import quantizer_options
from mpq.config import SensitivityConfig
from mpq.errors import MpqError
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.quantization.grids import Rounded
from mpq.quantization.levels import Levels, levels_of
from mpq.quantization.quantizers import dequantize, fake_quantize, quantize
from mpq.quantization.scales import normalised, range_around_zero, storable_scale
from mpq.quantization.spec import ROUNDINGS, SCHEMES, QuantSpec, Rounding, Scheme, unsigned_codes


class PowersOfTwo(Levels):
    """Levels -1, -1/2, -1/4 ... 1/4, 1/2, 1, so many as there are codes."""

    def bounds(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return range_around_zero(groups, spec)

    def spread(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return storable_scale(high, spec), torch.zeros_like(high)

    def centroids(self, parts: Sequence[Tensor], spec: QuantSpec) -> None:
        return None

    def nearest(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        distances = (normalised(groups, scale)[..., None] - self.table(spec)).abs()
        return distances.argmin(dim=-1).to(torch.float32)

    def rounded(
        self, groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, centroids: Tensor | None
    ) -> Tensor:
        return self.of(self.nearest(groups, scale, zero_point, spec, centroids), spec, centroids)

    def of(self, codes: Tensor, spec: QuantSpec, centroids: Tensor | None) -> Tensor:
        return self.table(spec)[codes.to(torch.int64)]

    def table(self, spec: QuantSpec) -> Tensor:
        powers = 2.0 ** -torch.arange(len(spec.codes) // 2)
        return torch.cat((-powers, powers.flip(0)))


def upwards(
    matrix: Tensor, specs: Sequence[QuantSpec], gram: Tensor | None, tables: Sequence[Tensor | None]
) -> list[Rounded]:
    """Rounds up to whole numbers."""
    return [
        Rounded(
            matrix.ceil().clamp(spec.codes[0], spec.codes[-1]), torch.ones(len(matrix), 1), torch.zeros(len(matrix), 1)
        )
        for spec in specs
    ]


@pytest.fixture
def powers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "powers", Scheme(f"{__name__}:PowersOfTwo", unsigned_codes))


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.2


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:7"])
@pytest.mark.parametrize("clip", ["none", "mse", "mae", "percentile:95"])
def test_a_new_scheme_quantizes(powers: None, granularity: str, clip: str) -> None:
    x = weight(5, 16)
    for bits in (1, 2, 4):
        spec = QuantSpec(bits, "powers", granularity, clip)
        quantized = quantize(x, spec)
        assert quantized.zero_point is None and quantized.centroids is None and quantized.codes.dtype == torch.uint8
        levels = [sign * 2.0**-power for sign in (-1, 1) for power in range(2 ** (bits - 1))]
        size = spec.group_size or 16
        for row, values in enumerate(dequantize(quantized, spec).tolist()):
            for column, value in enumerate(values):
                place = (0, 0) if granularity == "tensor" else (row, column // size)
                scale = float(quantized.scale[place])
                best = min(levels, key=lambda level: abs(float(x[row, column]) - scale * level))
                assert value == pytest.approx(scale * best)
    errors = [
        float((fake_quantize(x, QuantSpec(4, "powers", clip=clip)) - x).square().sum()) for clip in ("none", "mse")
    ]
    assert errors[1] < errors[0]  # the search did pay


def test_a_new_scheme_is_stored_and_read_back(powers: None, tmp_path: Path) -> None:
    weight_format = WeightFormat.from_options({"scheme": "powers", "granularity": "group:16"})
    assert weight_format.spec.rounding == "nearest"
    assert WeightFormat.from_json(weight_format.to_json()) == weight_format
    assert layer_bytes((4, 32), 3, weight_format) == 4 * 32 * 3 // 8 + 4 * 2 * 2  # codes and scales
    model = tiny_model()
    bits = {ref.name: 1 + index % 8 for index, ref in enumerate(model.weights())}
    size = sum(layer_bytes(ref.shape, bits[ref.name], weight_format) for ref in model.weights())
    write_artifact(tmp_path / "m.safetensors", model, bits, weight_format, fixed_bytes(model, weight_format) + size)
    packed, original = read_artifact(tmp_path / "m.safetensors").state_dict(), model.state_dict()
    for name, width in bits.items():
        expected = fake_quantize(original[name], QuantSpec(width, "powers", "group:16"))
        assert torch.equal(packed[name], expected)
        assert torch.equal(quantize_layer(name, original[name], weight_format, [width], {})[0], expected)


def test_a_new_scheme_says_what_it_lacks(powers: None) -> None:
    with pytest.raises(MpqError, match="rounding: the scheme powers has no gptq; use --rounding nearest"):
        QuantSpec(4, "powers", rounding="gptq")
    with pytest.raises(
        MpqError, match="scheme: expected symmetric or asymmetric or mulaw or entropy or powers, got 'power'"
    ):
        QuantSpec(4, "power")
    with pytest.raises(MpqError, match="scheme powers: its weights cannot be trained; allocate with another --scheme"):
        QuantizedWeights({"w": weight(2, 4)}, [{"w": 4}], WeightFormat(QuantSpec(8, "powers")), {}, "learned")


def test_a_new_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDINGS, "upwards", Rounding(f"{__name__}:upwards", needs_statistics=True))
    record = Scheme(SCHEMES["symmetric"].levels, SCHEMES["symmetric"].codes, roundings=("nearest", "upwards"))
    monkeypatch.setitem(SCHEMES, "symmetric", record)
    spec = QuantSpec(3, "symmetric", "channel", rounding="upwards")
    x = torch.tensor([[0.2, -1.7, 8.0]])
    assert fake_quantize(x, spec, torch.eye(3)[None]).tolist() == [[1.0, -1.0, 3.0]]
    with pytest.raises(MpqError, match="rounding upwards: expected statistics of the layer's inputs, got none"):
        quantize(x, spec)


def test_recipes_and_options_know_the_tables() -> None:
    fields = SensitivityConfig.model_fields
    for key, table in (("scheme", SCHEMES), ("rounding", ROUNDINGS)):
        names, none = get_args(fields[key].annotation)
        assert get_args(names) == tuple(table) and none is type(None)
    command = quantizer_options(lambda: None)
    choices = {option.opts[0]: option.type for option in command.__click_params__}
    assert list(choices["--scheme"].choices) == list(SCHEMES)
    assert list(choices["--rounding"].choices) == list(ROUNDINGS)


def test_every_record_leads_to_its_mathematics() -> None:
    for name, record in SCHEMES.items():
        spec = QuantSpec(4, name)
        assert isinstance(levels_of(spec), Levels)
        assert set(record.roundings) <= set(ROUNDINGS) and record.rounding_with_data in record.roundings
        assert (record.training == "straight_through") == bool(record.scales)
        quantized = quantize(weight(3, 8), spec)
        assert (quantized.zero_point is not None) == record.has_zero_points
        assert (quantized.centroids is not None) == record.has_centroids
