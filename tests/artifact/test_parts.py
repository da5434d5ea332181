"""Files of version 2: entropy-coded weights and a coded rest, from sensitivities to the file and back."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_cli import fails, result_json, run
from tiny_models import tiny_model

from mpq.artifact.file import fixed_bytes, read_artifact, size_slack, write_artifact
from mpq.artifact.parts import exact_names, fold_as_stored
from mpq.artifact.weights import WeightFormat, quantize_layer
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.folding import folded_state
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.statistics import input_grams

FORMAT = WeightFormat(QuantSpec(8, "entropy"))
MODEL = tiny_model()
REFS = MODEL.weights()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coded") / "m.safetensors"
    bits = {ref.name: (1.4, 2.2, 3, 5.4, 16, 32)[index % 6] for index, ref in enumerate(REFS)}
    assert write_artifact(path, MODEL, bits, FORMAT, None) == path.stat().st_size
    return path


def test_weights_come_back_bit_for_bit_and_the_rest_nearly(artifact: Path) -> None:
    packed = load_model(artifact)
    state, original, folded = packed.state_dict(), MODEL.state_dict(), folded_state(MODEL)
    for ref in REFS:
        width = packed.quantized_bits[ref.name]
        if width < 16:
            (expected,) = quantize_layer(ref.name, original[ref.name], FORMAT, [width], {})
        else:
            expected = original[ref.name].to(getattr(torch, f"float{width}")).float()
        assert torch.equal(state[ref.name], expected)
    for name, tensor in folded.items():
        if name.startswith("preprocessor"):
            assert torch.equal(state[name], tensor)
        elif name not in packed.quantized_bits and tensor.is_floating_point():
            assert float((state[name] - tensor).abs().max()) <= float(tensor.abs().max()) / 32, name
    assert sum(packed.quantized_bytes.values()) < artifact.stat().st_size
    assert exact_names(MODEL, FORMAT) == set()


def test_a_rest_in_single_precision_is_exact(tmp_path: Path) -> None:
    weight_format = WeightFormat(QuantSpec(8, "entropy"), "float32")
    write_artifact(tmp_path / "m", MODEL, {ref.name: 3 for ref in REFS}, weight_format, None)
    state, folded = read_artifact(tmp_path / "m").state_dict(), folded_state(MODEL)
    names = {ref.name for ref in REFS}
    assert all(torch.equal(state[name], one) for name, one in folded.items() if name not in names)


def test_a_flipped_bit_anywhere_is_refused(artifact: Path, tmp_path: Path) -> None:
    data = artifact.read_bytes()
    header = int.from_bytes(data[:8], "little")
    places = [*range(0, 8 + header, 7), *range(8 + header, len(data), 97), len(data) - 1]
    for index, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 1 << index % 8
        (tmp_path / "m").write_bytes(changed)
        with pytest.raises(MpqError):
            read_artifact(tmp_path / "m")


def test_the_size_is_kept_and_content_that_is_too_large_is_refused(tmp_path: Path) -> None:
    bits = {ref.name: 3 for ref in REFS}
    natural = write_artifact(tmp_path / "a", MODEL, bits, FORMAT, None)
    slack = size_slack(MODEL, FORMAT)
    for promised in (natural, natural + slack, natural - slack // 2):
        assert write_artifact(tmp_path / "b", MODEL, bits, FORMAT, promised) == promised
        assert (tmp_path / "b").stat().st_size == promised and read_artifact(tmp_path / "b")
    assert write_artifact(tmp_path / "b", MODEL, bits, FORMAT, natural + 10 * slack) == natural
    with pytest.raises(MpqError, match=r"does not fit into the .* planned; allocate for a target"):
        write_artifact(tmp_path / "c", MODEL, bits, FORMAT, natural - 2 * slack)
    assert not (tmp_path / "c").exists()
    assert natural > fixed_bytes(MODEL, FORMAT)


def test_from_sensitivities_to_the_file_every_byte_is_foreseen(
    tiny_archive: Path, tiny_manifest: Path, tmp_path: Path
) -> None:
    """By commands; with gptq, since there are data; the file holds what the table counted."""
    table = result_json("sensitivity", tiny_archive, "--data", tiny_manifest, "--out", tmp_path / "s.json", "--quiet")
    assert table["quantizer"]["scheme"] == "entropy" and table["quantizer"]["rounding"] == "gptq"
    assert len(table["bits"]) == 12 and set(table["layers"][0]["bytes"]) == {str(one) for one in table["bits"]}
    smallest = table["fixed_bytes"] + sum(layer["bytes"]["0.6"] for layer in table["layers"])
    target = (smallest + 1500) / 2**20
    allocation = result_json(
        "allocate", tmp_path / "s.json", "--target-mb", target, "--out", tmp_path / "a.json", "--quiet"
    )
    chosen = {layer["name"]: layer["bits"] for layer in allocation["layers"]}
    counted = {layer["name"]: layer["bytes"][str(chosen[layer["name"]])] for layer in table["layers"]}
    assert allocation["predicted_bytes"] == table["fixed_bytes"] + sum(counted.values()) <= target * 2**20
    out = tmp_path / "m.safetensors"
    packed = result_json("pack", tiny_archive, "--allocation", tmp_path / "a.json", "--out", out, "--quiet")
    assert packed["size_bytes"] == out.stat().st_size == allocation["predicted_bytes"]
    inspected = result_json("inspect", out)
    assert {one["name"]: one["bytes"] for one in inspected["layers"]} == counted
    assert {one["name"]: one["bits"] for one in inspected["layers"]} == chosen
    model = load_model(tiny_archive)
    drawn = draw(model, tiny_manifest, 300.0, is_varied=True)
    fold_as_stored(model, FORMAT)
    grams, state = input_grams(model, one_by_one(model, drawn)), model.state_dict()
    weight_format, stored = WeightFormat.from_json(table["quantizer"]), read_artifact(out).state_dict()
    for name, rate in chosen.items():
        (expected,) = quantize_layer(name, state[name], weight_format, [rate], grams)
        assert torch.equal(stored[name], expected), name


def test_the_file_is_the_same_for_any_number_of_threads(
    tiny_archive: Path, tiny_manifest: Path, tmp_path: Path
) -> None:
    found = set()
    for threads in ("1", "2", "3"):
        out = tmp_path / f"{threads}.safetensors"
        command = ["pack", tiny_archive, "--bits", "2.5", "--scheme", "entropy", "--data", tiny_manifest, "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MPQ_CACHE": str(tmp_path / threads)}
        subprocess.run([sys.executable, "-m", "mpq", *command, "--quiet"], env=environment, check=True)
        found.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(found) == 1


def test_without_data_one_step_a_layer_is_rounded_to_nearest(tiny_archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    packed = result_json("pack", tiny_archive, "--bits", 3.5, "--scheme", "entropy", "--out", out, "--quiet")
    assert packed["rounding"] == "nearest" and packed["average_bits"] == 3.5
    again = run("pack", tiny_archive, "--bits", 3.5, "--scheme", "entropy", "--out", out, "--quiet")
    assert "rounding nearest, one step a layer (steps for each column need calibration data)" in again.stdout
    assert {one["bits"] for one in result_json("inspect", out)["layers"]} == {3.5}


def test_rates_and_widths_are_told_apart(tiny_archive: Path, tiny_manifest: Path, tmp_path: Path) -> None:
    command = ("sensitivity", tiny_archive, "--data", tiny_manifest, "--out", tmp_path / "s.json")
    fails(*command, "--bits", "2,3", "--rates", "2.5", words="expected one of them, got both")
    fails(*command, "--bits", "2.5,3", words="bits: expected a whole number from 1 to 8, got 2.5")
    fails(*command, "--rates", "2.5,9", words="expected a rate from 0.1 to 8 bits a weight")
    fails(
        *command,
        "--rates",
        "2.5",
        "--scheme",
        "symmetric",
        words="rates: the scheme symmetric has bit-widths; give bits",
    )
    fails(*command, "--scheme", "entropy", "--clip", "mse", words="the scheme entropy has none alone")
    fails(*command, "--rest-dtype", "float16", words="rest_dtype: expected coded or float32 for the scheme entropy")
    assert not (tmp_path / "s.json").exists()


def test_an_allocation_of_rates_is_measured_and_refined(tiny_archive: Path, many_tones: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "s.json", tmp_path / "a.json"
    command = ("sensitivity", tiny_archive, "--data", many_tones, "--seconds", 3, "--rates", "1.4,2.2,3,5")
    sizes = result_json(*command, "--out", table, "--quiet")
    target = (sizes["fixed_bytes"] + sum(layer["bytes"]["2.2"] for layer in sizes["layers"])) / 2**20
    options = ("--target-mb", target, "--minutes", 0.2, "--points", 2, "--keep", "decoder.*=2.2", "--out", out)
    refined = result_json("allocate", table, "--refine", tiny_archive, *options, "--quiet")
    assert refined["predicted_bytes"] <= target * 2**20 and 0 < refined["measured_kl"] < 1
    assert all(layer["bits"] >= 2.2 for layer in refined["layers"] if layer["name"].startswith("decoder."))
    packed = result_json("pack", tiny_archive, "--allocation", out, "--out", tmp_path / "m", "--quiet")
    assert packed["size_bytes"] == refined["predicted_bytes"]
    assert packed["measured_kl"] == pytest.approx(
        refined["measured_kl"], rel=0.3
    )  # on the same audio; the rest is coded
