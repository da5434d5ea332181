"""Exact sensitivity against the plain definition: one whole forward pass a point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_model

from mpq.artifact.file import fixed_bytes
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.cli.main import main
from mpq.errors import MpqError
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.measure import mean_kl, measure_kl, measure_sensitivity
from mpq.sensitivity.records import SensitivityTable
from mpq.speech.audio import pad_batch

STORAGE = WeightFormat(QuantSpec(8))


def tiny_data(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    waves = [0.1 * torch.randn(size, generator=generator) for size in (16000, 12000, 7000, 3000)]
    return [model.features(*pad_batch(waves[:2])), model.features(*pad_batch(waves[2:]))]


def whole_forward_kl(model, data, name: str, bits: int, output: str) -> float:
    """Eq. 7 written down: every utterance on its own, every frame, nothing cached."""

    def distributions() -> list[torch.Tensor]:
        rows = []
        for features, lengths in data:
            for i, length in enumerate(lengths.tolist()):
                encoded, _ = model.encode(features[i : i + 1, :length], lengths[i : i + 1])
                x = encoded if output == "encoder" else model.ctc_log_probs(encoded)
                rows.append(x[0].double().softmax(dim=-1))
        return rows

    with torch.inference_mode():
        before = distributions()
        parameter = dict(model.named_parameters())[name]
        original = parameter.data
        parameter.data = fake_quantize(original, QuantSpec(bits))
        after = distributions()
        parameter.data = original
    frames = [(p * (p / q).log()).sum(dim=-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(frames).mean())


@pytest.mark.parametrize("output", ["ctc", "encoder"])
def test_equal_to_whole_forward_passes(output: str) -> None:
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = tiny_data(model)
    points = [(ref.name, bits) for ref in model.weights() for bits in (2, 5)]
    got = measure_kl(model, data, points, STORAGE, output)
    assert list(got) == sorted(got, key=points.index) and set(got) == set(points)
    for name, bits in points:
        of = "ctc" if name.startswith("decoder.") else output
        assert got[name, bits] == pytest.approx(whole_forward_kl(model, data, name, bits, of), rel=1e-4, abs=1e-10)
        assert got[name, bits] >= 0
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert max(got.values()) > 0.01


def test_mean_is_over_frames_and_kl_is_torchs() -> None:
    p = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert mean_kl([(p, q)]) == pytest.approx(float(expected))
    assert mean_kl([(p[:1], q[:1]), (p[1:], q[1:])]) == pytest.approx(float(expected))


def test_padding_does_not_count() -> None:
    model = tiny_model()
    waves = [w for w in 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))]
    waves[1] = waves[1][:5000]
    points = [("encoder.layers.0.feed_forward1.linear1.weight", 3)]
    together = measure_kl(model, [model.features(*pad_batch(waves))], points, STORAGE)
    apart = measure_kl(model, [model.features(*pad_batch([wave])) for wave in waves], points, STORAGE)
    assert together[points[0]] == pytest.approx(apart[points[0]], rel=1e-5)


def test_a_divergence_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.encoder.layers[0].feed_forward1.linear1.bias[0] = 3e38
        model.encoder.layers[0].feed_forward1.linear2.weight[:, 0] = 3e38
    with pytest.raises(MpqError, match=r"linear1\.weight at 2 bits"):
        measure_kl(model, tiny_data(model), [("encoder.layers.0.feed_forward1.linear1.weight", 2)], STORAGE)


def measure(archive: Path, manifest: Path, out: Path, bits=(2, 4), **options) -> SensitivityTable:
    return measure_sensitivity(archive, manifest, bits, out, STORAGE, quiet=True, device="cpu", **options)


def test_the_file(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    table = measure(tiny_archive, tiny_manifest, tmp_path / "sens.json")
    assert SensitivityTable.load(tmp_path / "sens.json") == table
    model = tiny_model()
    assert [layer.name for layer in table.layers] == [ref.name for ref in model.weights()]
    assert table.fixed_bytes == fixed_bytes(model, STORAGE)
    for layer in table.layers:
        assert layer.size_bytes == {bits: layer_bytes(layer.shape, bits, STORAGE) for bits in (2, 4)}
    raw = json.loads((tmp_path / "sens.json").read_text())
    assert raw["format"] == "mpq.sensitivity/1" and raw["data"]["utterances"] == 6 and raw["data"]["frames"] > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sens.json"]


def test_a_part_of_the_data(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    table = measure(tiny_archive, tiny_manifest, tmp_path / "a.json", bits=(2,), max_seconds=2.0)
    other = measure(tiny_archive, tiny_manifest, tmp_path / "b.json", bits=(2,), max_seconds=2.0, seed=1)
    assert 1 <= table.data["utterances"] < 6
    assert table.data["seconds"] <= 2.0
    assert table.fingerprint != other.fingerprint


def test_finished_points_are_not_measured_again(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    """With one more width only that one is measured: the others keep a value that was planted in the file."""
    out = tmp_path / "sens.json"
    measure(tiny_archive, tiny_manifest, out, bits=(2,))
    raw = json.loads(out.read_text())
    raw["layers"][0]["kl"]["2"] = 123.0
    out.write_text(json.dumps(raw))
    table = measure(tiny_archive, tiny_manifest, out, bits=(2, 3))
    assert table.layers[0].kl[2] == 123.0
    fresh = measure(tiny_archive, tiny_manifest, tmp_path / "fresh.json", bits=(2, 3))
    assert table.layers[1:] == fresh.layers[1:] and table.layers[0].kl[3] == fresh.layers[0].kl[3]


def test_other_input_does_not_reuse_points(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    out = tmp_path / "sens.json"
    first = measure(tiny_archive, tiny_manifest, out, bits=(2,))
    second = measure(tiny_archive, tiny_manifest, out, bits=(2,), output="encoder")
    assert first.fingerprint != second.fingerprint and first.layers[0].kl != second.layers[0].kl


def test_two_processes_give_the_same(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    """To the byte, when each has as many threads as the one (torchrun gives each one thread)."""
    command = ["sensitivity", str(tiny_archive), "--data", str(tiny_manifest), "--bits", "2,4", "--quiet", "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mpq"]
    two = subprocess.run([*launcher, *command, str(tmp_path / "two.json")], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    one = CliRunner().invoke(main, [*command, str(tmp_path / "one.json")])
    assert one.exit_code == 0, one.output
    assert two.stdout.count("sum of all layers") == one.stdout.count("sum of all layers") == 1
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
