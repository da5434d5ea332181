"""A hybrid model packed, and taken through the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from tiny_data import drawn_parts
from tiny_hybrids import hybrid, plain_rows, utterances, waves

from mpq.allocation.records import Allocation
from mpq.artifact.file import fixed_bytes, write_artifact
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.cli.main import main
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.models.checkpoint import write_checkpoint
from mpq.models.hybrid import HybridConformer
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.records import SensitivityTable
from mpq.sensitivity.statistics import cache_folder, input_grams
from mpq.speech.audio import pad_batch
from mpq.speech.decoding import DecodeOptions

EMBED, SOURCE, OUTPUT = "decoder.embed.weight", "decoder.layers.0.src_attn.linear_k.weight", "decoder.output.weight"
HEAD, ENCODER = "ctc.weight", "encoder.layers.0.conv.depthwise_conv.weight"


def test_a_packed_file_gives_back_every_bit(tmp_path: Path) -> None:
    model = hybrid()
    weight_format = WeightFormat(QuantSpec(8, rounding="gptq"))
    refs = model.weights()
    bits = {ref.name: (2, 3, 8, 16, 5)[i % 5] for i, ref in enumerate(refs)}
    grams = input_grams(model, utterances(model))
    size = fixed_bytes(model, weight_format) + sum(
        layer_bytes(ref.shape, bits[ref.name], weight_format) for ref in refs
    )
    path = tmp_path / "m.safetensors"
    write_artifact(path, model, bits, weight_format, size, grams)
    assert path.stat().st_size == size
    expected = model.state_dict()
    for name, width in bits.items():
        spec = QuantSpec(min(width, 8), rounding="gptq")
        whole = expected[name].half().float() if width == 16 else fake_quantize(expected[name], spec, grams[name])
        expected[name] = whole
    for name, tensor in expected.items():
        if name not in bits and (name in dict(model.named_parameters()) or "running" in name):
            expected[name] = tensor.half().float()
    packed = load_model(path)
    assert isinstance(packed, HybridConformer) and packed.decoder.options == model.decoder.options
    assert packed.quantized_bits == bits
    assert all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in expected.items())
    model.load_state_dict(expected)
    waveforms = pad_batch(waves())
    for method in ("joint", "prefix", "greedy"):
        options = DecodeOptions(method, beam_size=4)
        found = packed.transcribe(*waveforms, options)
        assert found == model.transcribe(*waveforms, options) and any(found)
    assert packed.transcribe(*waveforms, DecodeOptions("joint", beam_size=4)) != packed.transcribe(*waveforms)


def mpq(*arguments: object) -> dict | str:
    """Runs a command and returns what it printed, parsed where it is JSON."""
    done = CliRunner().invoke(main, [*map(str, arguments), "--quiet", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.mark.parametrize("method, rounding", [("fisher", "gptq"), ("kl", "nearest")])
def test_the_whole_chain(tmp_path: Path, tiny_manifest: Path, method: str, rounding: str) -> None:
    """Measured, allocated, packed, inspected and recognised with, all from files."""
    checkpoint, sens, alloc, packed = (
        tmp_path / name for name in ("m.safetensors", "s.json", "a.json", "p.safetensors")
    )
    write_checkpoint(checkpoint, hybrid())
    names = [ref.name for ref in hybrid().weights()]
    before = set(cache_folder().glob("grams-*"))
    options = ["--method", method, "--rounding", rounding, "--output", "decoder", "--seconds", "1.5"]
    text = mpq("sensitivity", checkpoint, "--data", tiny_manifest, "--bits", "2,4,8", "--out", sens, *options)
    assert "KL divergence of the decoder output, nats per token" in text
    table = SensitivityTable.load(sens)
    assert [layer.name for layer in table.layers] == names
    assert all(layer.kl[2] > layer.kl[8] > 0 for layer in table.layers)
    assert len(set(cache_folder().glob("grams-*")) - before) == (rounding == "gptq")
    found = mpq(
        "allocate", sens, "--average-bits", "4", "--measure", checkpoint, "--points", "0", "--out", alloc, "--json"
    )
    assert found["measured_kl"] > 0
    allocation = Allocation.load(alloc)
    assert len(set(allocation.bits.values())) == 3
    done = mpq("pack", checkpoint, "--allocation", alloc, "--out", packed, "--json")
    assert done["size_bytes"] == packed.stat().st_size == allocation.predicted_bytes
    assert done["measured_kl"] == pytest.approx(found["measured_kl"], rel=1e-2)  # rest_dtype is no part of the latter
    (_, fresh) = drawn_parts(tiny_manifest, 1.5, 300.0)
    assert done["measured_kl"] == pytest.approx(plain_divergence(load_model(packed), fresh), rel=1e-4)
    shown = mpq("inspect", packed, "--json")
    assert {layer["name"]: layer["bits"] for layer in shown["layers"]} == allocation.bits
    evaluate = ["evaluate", packed, "--data", tiny_manifest, "--decode", "joint", "--beam-size", "2", "--json"]
    assert mpq(*evaluate, "--out", tmp_path / "e")["words"] == 18


def plain_divergence(packed: AsrModel, files: list[Path]) -> float:
    """Returns the mean of KL, at most 1 each, over the frames and tokens of these files."""
    model, rows = hybrid(), []
    for file in files:
        samples = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
        features, lengths = model.features(samples[None], torch.tensor([len(samples)]))
        for output in ("ctc", "decoder"):
            one = features[:, : int(lengths)], lengths
            p, q = (plain_rows(model, of, output, *one) for of in (model, packed))
            rows += (p * (p / q).log()).sum(dim=-1).clamp(max=1.0).tolist()
    return float(np.mean(rows))


def test_a_ctc_model_has_no_decoder_to_ask(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    done = CliRunner().invoke(
        main,
        f"sensitivity {tiny_archive} --data {tiny_manifest} --bits 2 --output decoder --out {tmp_path / 's.json'}",
    )
    assert done.exit_code == 2 and "which this model has, got 'decoder'" in done.output
    assert list(tmp_path.iterdir()) == []
