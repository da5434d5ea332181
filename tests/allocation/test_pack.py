"""The step from checkpoint to packed file: which weights are in it, from which audio, and what it says of itself."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_data import audio_seconds, drawn_parts, plain_divergence
from tiny_models import nemo_config, tiny_model, write_nemo
from torch import Tensor

from mpq.allocation.moves import Effort
from mpq.allocation.pack import pack as pack_checkpoint
from mpq.allocation.records import Allocation
from mpq.allocation.refine import allocate_measured
from mpq.allocation.solve import allocate
from mpq.artifact.file import fixed_bytes
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.quantization.quantizers import dequantize, quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.measure import measure_sensitivity
from mpq.sensitivity.statistics import input_grams

SEEN, FRESH = 2.0, 3.0
"""Seconds of audio for the statistics, and to measure the file on."""


pack = partial(pack_checkpoint, held_out_seconds=FRESH)
"""The step, which measures on little audio."""


@pytest.fixture
def tones(tmp_path: Path, many_tones: Path) -> Path:
    """A copy of the audio that can be moved and changed."""
    return shutil.copytree(many_tones.parent, tmp_path / "tones") / many_tones.name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def allocated(archive: Path, manifest: Path, folder: Path, rounding: str = "gptq", **options) -> Allocation:
    """Returns an allocation of the size of 4 bits, with one layer left unquantized."""
    weight_format = WeightFormat(QuantSpec(8, rounding=rounding), options.pop("rest_dtype", "float16"))
    table = measure_sensitivity(
        archive,
        manifest,
        (2, 4, 8),
        folder / "sens.json",
        weight_format,
        max_seconds=SEEN,
        seed=3,
        quiet=True,
        **options,
    )
    target = table.fixed_bytes + sum(layer.size_bytes[4] for layer in table.layers) + 1000
    return allocate(table, target_bytes=target, exclude=["encoder.pre_encode.conv.0.weight"])


def expected_weights(bits: dict[str, int], weight_format: WeightFormat, manifest: Path, **drawn) -> dict[str, Tensor]:
    """Returns what quantizing each layer on its own gives."""
    model = tiny_model()
    drawn = {"max_seconds": SEEN, "seed": 3} | drawn
    grams = input_grams(model, one_by_one(model, draw(model, manifest, **drawn)))
    found = {}
    for name, width in bits.items():
        weight = model.state_dict()[name]
        spec = replace(weight_format.spec, bits=min(width, 8))
        gram = grams[name] if spec.rounding == "gptq" else None
        found[name] = weight.half().float() if width == 16 else dequantize(quantize(weight, spec, gram), spec)
    return found


def assert_holds(path: Path, expected: dict[str, Tensor]) -> None:
    state = load_model(path).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def divergence(path: Path, files: list[Path], output: str = "ctc") -> float:
    sums, frames = plain_divergence(tiny_model(), load_model(path), files, output).sum(dim=0).tolist()
    return sums / frames


@pytest.mark.parametrize("rounding, output", [("gptq", "ctc"), ("nearest", "encoder")])
def test_an_allocation_is_packed_as_it_says(
    tmp_path: Path, tiny_archive: Path, many_tones: Path, rounding: str, output: str
) -> None:
    chosen = allocated(tiny_archive, many_tones, tmp_path, rounding, output=output)
    assert set(chosen.bits.values()) == {2, 4, 8, 16}
    out = tmp_path / "m.safetensors"
    done = pack(tiny_archive, out, chosen, device="cpu")
    weight_format = WeightFormat.from_json(chosen.quantizer)
    assert_holds(out, expected_weights(chosen.bits, weight_format, many_tones))
    model = tiny_model()
    numel = {ref.name: ref.numel for ref in model.weights()}
    size = fixed_bytes(model, weight_format) + sum(
        layer_bytes(ref.shape, chosen.bits[ref.name], weight_format) for ref in model.weights()
    )
    assert out.stat().st_size == size == done.size_bytes == chosen.predicted_bytes <= chosen.target_bytes
    _, fresh = drawn_parts(many_tones, SEEN, FRESH, seed=3)
    said = done.to_json()
    assert said.pop("measured_kl") == pytest.approx(divergence(out, fresh), rel=2e-4)
    assert (
        said.pop("measured_on") == f"{audio_seconds(fresh):.0f} s of {many_tones} that the sensitivities have not seen"
    )
    parameters = model.parameter_counts()["total"]
    codes = sum(numel[name] * bits for name, bits in chosen.bits.items())
    assert said == {
        "format": "mpq.pack/1",
        "path": str(out),
        "size_bytes": size,
        "predicted_bytes": chosen.predicted_bytes,
        "target_bytes": chosen.target_bytes,
        "nominal_bytes": -(-(codes + 16 * (parameters - sum(numel.values()))) // 8),
        "float_bytes": 4 * parameters,
        "ratio": 4 * parameters / size,
        "average_bits": codes / sum(numel.values()),
        "scheme": "asymmetric",
        "rounding": rounding,
        "predicted_kl": chosen.predicted_kl,
    }


def test_gptq_is_another_rounding_and_a_better_one(tmp_path: Path, tiny_archive: Path, many_tones: Path) -> None:
    done = {
        rounding: pack(
            tiny_archive, tmp_path / rounding, bits=3, options={"rounding": rounding}, data=many_tones, max_seconds=SEEN
        )
        for rounding in ("nearest", "gptq")
    }
    assert done["gptq"].size_bytes == done["nearest"].size_bytes
    assert 0 < done["gptq"].measured_kl < 0.8 * done["nearest"].measured_kl


def test_one_width_with_and_without_data(tmp_path: Path, tiny_archive: Path, many_tones: Path) -> None:
    out = tmp_path / "m.safetensors"
    bits = {ref.name: 4 for ref in tiny_model().weights()}
    options = {"data": many_tones, "max_seconds": 1.0, "seed": 5}
    done = pack(tiny_archive, out, bits=4, **options)
    assert done.rounding == "gptq"
    with_data = WeightFormat(QuantSpec(8, rounding="gptq"))
    assert_holds(out, expected_weights(bits, with_data, many_tones, max_seconds=1.0, seed=5))
    _, fresh = drawn_parts(many_tones, 1.0, FRESH, seed=5)
    assert done.measured_kl == pytest.approx(divergence(out, fresh), rel=2e-4)
    nearest = expected_weights(bits, WeightFormat(QuantSpec(8)), many_tones)
    done = pack(tiny_archive, out, bits=4)
    assert (done.rounding, done.measured_kl) == ("nearest", None)
    assert done.measured_on == "no calibration data are known; --data names some"
    assert (done.predicted_bytes, done.target_bytes, done.predicted_kl) == (None, None, None)
    assert_holds(out, nearest)
    (fresh,) = drawn_parts(many_tones, FRESH, seed=5)  # nothing is needed to round by, so nothing is drawn for it
    done = pack(tiny_archive, out, bits=4, options={"rounding": "nearest"}, **options)
    assert done.rounding == "nearest" and done.measured_kl == pytest.approx(divergence(out, fresh), rel=2e-4)
    assert_holds(out, nearest)
    done = pack(tiny_archive, out, data=many_tones, max_seconds=1.0, seed=5)  # floats of half precision
    assert done.rounding == "nearest" and done.average_bits == 16
    assert done.measured_kl == pytest.approx(divergence(out, fresh), rel=0.02) and done.measured_kl < 1e-5
    with pytest.raises(MpqError, match=r"rounding gptq needs calibration data: .*--data names some"):
        pack(tiny_archive, tmp_path / "x", bits=4, options={"rounding": "gptq"})
    with pytest.raises(MpqError, match="more than 0 seconds, or all, got 0"):
        pack(tiny_archive, tmp_path / "x", bits=4, data=many_tones, max_seconds=0)
    assert not (tmp_path / "x").exists()


def test_all_data_used_leaves_nothing_to_measure_on(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    done = pack(tiny_archive, tmp_path / "m", bits=4, data=tiny_manifest, max_seconds=None)
    assert done.rounding == "gptq" and done.measured_kl is None
    assert done.measured_on == f"{tiny_manifest} has no audio left that was not used for calibration"


def test_statistics_are_found_without_the_audio(
    tmp_path: Path, tiny_archive: Path, tones: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = allocated(tiny_archive, tones, tmp_path)
    expected = expected_weights(chosen.bits, WeightFormat.from_json(chosen.quantizer), tones)
    out, moved = tmp_path / "m.safetensors", tmp_path / "moved"
    tones.parent.rename(moved)
    done = pack(tiny_archive, out, chosen)
    assert_holds(out, expected)
    whole = out.read_bytes()
    assert done.measured_kl is None and done.measured_on.startswith(f"{tones}: no such file")
    assert done.size_bytes == len(whole) == chosen.predicted_bytes
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "empty"))
    out.unlink()
    with pytest.raises(MpqError, match=r"m\.safetensors: rounding gptq needs calibration data: .*no such file"):
        pack(tiny_archive, out, chosen)
    assert not out.exists()
    done = pack(tiny_archive, out, chosen, data=moved / tones.name)
    assert out.read_bytes() == whole
    _, fresh = drawn_parts(moved / tones.name, SEEN, FRESH, seed=3)
    assert done.measured_kl == pytest.approx(divergence(out, fresh), rel=2e-4)
    nearest = replace(chosen, quantizer=chosen.quantizer | {"rounding": "nearest"})
    done = pack(tiny_archive, out, nearest)  # needs none
    assert done.rounding == "nearest" and done.measured_kl is None


def test_the_cache_is_that_of_model_and_audio(tmp_path: Path, tiny_archive: Path, tones: Path, cache: Path) -> None:
    """Packing does not collect again what measuring left; another model's statistics are not taken for its own."""
    chosen = allocated(tiny_archive, tones, tmp_path)
    (file,) = cache.glob("grams-*")
    written = file.read_bytes()
    shutil.rmtree(tones.parent)
    model = tiny_model()
    with torch.no_grad():
        model.encoder.layers[0].feed_forward1.linear1.weight[0, 0] += 1
    other = write_nemo(tmp_path / "other.nemo", nemo_config(), model.state_dict())
    with pytest.raises(MpqError, match="needs calibration data"):
        pack(other, tmp_path / "m", replace(chosen, model={}))
    pack(tiny_archive, tmp_path / "m", chosen)
    assert [path.read_bytes() for path in cache.glob("grams-*")] == [written]


def test_other_audio_is_refused(tmp_path: Path, tiny_archive: Path, tones: Path, cache: Path) -> None:
    chosen = allocated(tiny_archive, tones, tmp_path)
    expected = expected_weights(chosen.bits, WeightFormat.from_json(chosen.quantizer), tones)
    (file, *_), _ = drawn_parts(tones, SEEN, FRESH, seed=3)
    soundfile.write(file, 0.5 * soundfile.read(file)[0], 16000)
    out = tmp_path / "m"
    with pytest.raises(MpqError, match=r"tones\.jsonl: not the audio that the sensitivities were measured with"):
        pack(tiny_archive, out, chosen, data=tones)
    assert not out.exists()
    done = pack(tiny_archive, out, chosen)  # by the statistics of the audio as it was
    assert_holds(out, expected)
    assert done.measured_kl is None and "not the audio" in done.measured_on
    shutil.rmtree(cache)
    with pytest.raises(MpqError, match=r"needs calibration data: .*not the audio"):
        pack(tiny_archive, tmp_path / "x", chosen)


def test_options_may_not_contradict_the_allocation(tmp_path: Path, tiny_archive: Path, many_tones: Path) -> None:
    chosen = allocated(tiny_archive, many_tones, tmp_path)
    out = tmp_path / "m"
    for key, value in {
        "rounding": "nearest",
        "scheme": "symmetric",
        "granularity": "channel",
        "clip": "none",
        "scale_dtype": "float32",
        "rest_dtype": "float32",
    }.items():
        with pytest.raises(MpqError, match=f"--{key.replace('_', '-')} {value}: the allocation was made for"):
            pack(tiny_archive, out, chosen, options={key: value})
    assert not out.exists()
    pack(tiny_archive, out, chosen, options=chosen.quantizer)
    hand_made = replace(chosen, quantizer={})
    assert pack(tiny_archive, out, hand_made, options={"rounding": "nearest"}).rounding == "nearest"


def test_the_promise_of_a_refined_allocation_is_measured_again(
    tmp_path: Path, tiny_archive: Path, many_tones: Path
) -> None:
    """On the audio of its own verdict: neither that of the sensitivities nor that which decided on moves."""
    weight_format = WeightFormat(QuantSpec(8, rounding="gptq"), "float32")
    table = measure_sensitivity(
        tiny_archive, many_tones, (2, 4, 8), tmp_path / "s.json", weight_format, max_seconds=SEEN, quiet=True
    )
    target = {"target_bytes": table.fixed_bytes + sum(layer.size_bytes[4] for layer in table.layers)}
    out = tmp_path / "m"
    for effort in (None, Effort(most_promising=3)):
        options = {"points": 0, "effort": effort, "held_out_seconds": FRESH, "device": "cpu"}
        measured = allocate_measured(table, tiny_archive, tmp_path / "a.json", target, **options)
        done = pack(tiny_archive, out, Allocation.load(tmp_path / "a.json"))
        assert done.size_bytes == measured.predicted_bytes <= measured.target_bytes == target["target_bytes"]
        assert done.measured_kl == pytest.approx(measured.measured_kl, rel=2e-4)
        parts = drawn_parts(many_tones, SEEN, *([FRESH] if effort else []), FRESH)
        assert done.measured_kl == pytest.approx(divergence(out, parts[-1]), rel=2e-4)
        assert done.measured_kl != pytest.approx(divergence(out, parts[0]), rel=1e-3)


def test_an_allocation_that_does_not_say_its_audio(tmp_path: Path, tiny_archive: Path, many_tones: Path) -> None:
    """As an older mpq or a hand wrote it: no keys that say how the audio was drawn."""
    old = replace(
        allocated(tiny_archive, many_tones, tmp_path, "nearest"),
        quantizer={"scheme": "asymmetric", "granularity": "group:64", "clip": "mse"},
        data={"path": str(many_tones), "utterances": 4, "frames": 50},
    )
    old.save(tmp_path / "a.json")
    raw = json.loads((tmp_path / "a.json").read_text())
    for key in ("measured", "measured_kl", "measured_seconds", "refinement", "frontier_note", "fingerprint"):
        del raw[key]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    old = Allocation.load(tmp_path / "a.json")
    out = tmp_path / "m"
    done = pack(tiny_archive, out, old)
    assert done.rounding == "nearest" and done.measured_kl is None and "--data names some" in done.measured_on
    assert done.size_bytes == old.predicted_bytes
    assert_holds(out, expected_weights(old.bits, WeightFormat(QuantSpec(8)), many_tones))
    done = pack(tiny_archive, out, old, data=many_tones)
    (fresh,) = drawn_parts(many_tones, FRESH)
    assert done.measured_kl == pytest.approx(divergence(out, fresh), rel=2e-4)
    with pytest.raises(MpqError, match="needs calibration data"):
        pack(tiny_archive, out, old, options={"rounding": "gptq"})
    half_said = replace(old, data=old.data | {"sha256": "0" * 64})
    done = pack(tiny_archive, out, half_said)
    assert done.measured_on.startswith("the sensitivities do not say which audio they were measured on")
    assert "'max_seconds'" in done.measured_on
    gptq = pack(tiny_archive, out, old, options={"rounding": "gptq"}, data=many_tones, max_seconds=1.0)
    assert gptq.rounding == "gptq"
    expected = expected_weights(
        old.bits, WeightFormat(QuantSpec(8, rounding="gptq")), many_tones, max_seconds=1.0, seed=0
    )
    assert_holds(out, expected)


def test_inputs_are_not_overwritten(tmp_path: Path, tiny_archive: Path, tones: Path) -> None:
    text = tones.read_text()
    with pytest.raises(MpqError, match="would be overwritten"):
        pack(tiny_archive, tones, bits=4, data=tones)
    assert tones.read_text() == text
