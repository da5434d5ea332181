"""`mpq sensitivity`, `mpq allocate` and `mpq pack` as a user runs them, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from tiny_cli import fails, result_json, run
from tiny_models import nemo_config, tiny_model, write_nemo

from mpq.loading import load_model
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec


def test_the_file_has_the_predicted_size_and_keeps_the_budget(chain: dict) -> None:
    size = (chain["folder"] / "small.safetensors").stat().st_size
    assert size == chain["allocation"]["predicted_bytes"] == chain["pack"]["size_bytes"] <= chain["target"]
    assert size == chain["sensitivity"]["fixed_bytes"] + sum(
        layer["bytes"][str(allocated["bits"])]
        for layer, allocated in zip(chain["sensitivity"]["layers"], chain["allocation"]["layers"], strict=True)
    )
    assert chain["inspection"]["file_bytes"] == size
    assert [(layer["name"], layer["bits"]) for layer in chain["inspection"]["layers"]] == [
        (layer["name"], layer["bits"]) for layer in chain["allocation"]["layers"]
    ]
    assert sum(layer["bytes"] for layer in chain["inspection"]["layers"]) == size - chain["sensitivity"]["fixed_bytes"]


def test_uniform_and_unquantized_packing(tmp_path: Path, tiny_archive: Path) -> None:
    sizes = [
        result_json("pack", tiny_archive, *options, "--out", tmp_path / "m.safetensors")["size_bytes"]
        for options in (["--bits", 2], ["--bits", 8], [], ["--rest-dtype", "float32"])
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_defaults_are_the_measured_best(chain: dict) -> None:
    table = chain["sensitivity"]
    assert table["method"] == "fisher" and table["output"] == "ctc" and table["quantizer"] == {
        "scheme": "asymmetric", "granularity": "group:64", "clip": "mse", "rounding": "gptq", "scale_dtype": "float16",
        "rest_dtype": "float16",
    }  # fmt: skip
    assert table["data"]["max_seconds"] == 300 and table["data"]["seed"] == 0
    for layer in table["layers"]:
        for bits in ("2", "4", "8"):
            low, high = layer["interval"][bits]
            assert 0 <= low < layer["kl"][bits] < high
    assert chain["pack"]["rounding"] == "gptq" and chain["pack"]["measured_kl"] is None
    assert chain["allocation"]["quantizer"] == table["quantizer"] and chain["allocation"]["measured_kl"] is None


def test_other_methods_and_roundings(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    command = ["sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2", "--out", tmp_path / "s.json"]
    exact = result_json(*command, "--method", "kl", "--rounding", "nearest", "--seed", "3")
    assert (exact["method"], exact["quantizer"]["rounding"]) == ("kl", "nearest")
    assert exact["data"]["max_seconds"] == 60 and exact["data"]["seed"] == 3
    assert all("interval" not in layer for layer in exact["layers"])
    assert result_json(*command, "--seconds", "2.5")["data"]["max_seconds"] == 2.5
    everything = result_json(*command, "--seconds", "all")["data"]
    assert everything["max_seconds"] is None and everything["utterances"] == 6


def test_mulaw_from_end_to_end(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    sens, alloc, small = tmp_path / "s.json", tmp_path / "a.json", tmp_path / "m.safetensors"
    data = ["--data", tiny_manifest]
    command = ["sensitivity", tiny_archive, *data, "--bits", "1,2,4", "--scheme", "mulaw"]
    table = result_json(*command, "--granularity", "channel", "--out", sens)
    assert (table["quantizer"]["scheme"], table["quantizer"]["rounding"]) == ("mulaw", "nearest")
    target = table["fixed_bytes"] + sum(layer["bytes"]["2"] for layer in table["layers"])
    allocation = result_json("allocate", sens, "--target-mb", target / 2**20, "--out", alloc)
    packed = result_json("pack", tiny_archive, "--allocation", alloc, "--out", small)
    assert small.stat().st_size == packed["size_bytes"] == allocation["predicted_bytes"] <= target
    inspection = result_json("inspect", small)
    assert sum(layer["bytes"] for layer in inspection["layers"]) == small.stat().st_size - table["fixed_bytes"]
    state, original = load_model(small).state_dict(), load_model(tiny_archive).state_dict()
    assert {layer["bits"] for layer in allocation["layers"]} == {1, 2, 4}
    for layer in allocation["layers"]:
        spec = QuantSpec(layer["bits"], "mulaw", "channel")
        assert torch.equal(state[layer["name"]], fake_quantize(original[layer["name"]], spec))
    uniform = result_json("pack", tiny_archive, *data, "--bits", 2, "--scheme", "mulaw", "--out", small)
    assert uniform["rounding"] == "nearest" and uniform["measured_kl"] > 0
    fails(*command, "--rounding", "gptq", "--out", sens, words="use --rounding nearest")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_archive: Path, many_tones: Path) -> dict:
    """Sensitivities on a part of the data, and the size with all layers at 4 bits."""
    sens = tmp_path_factory.mktemp("measured") / "sens.json"
    command = ["sensitivity", tiny_archive, "--data", many_tones, "--seconds", "1.5", "--bits", "2,4,8", "--out", sens]
    table = result_json(*command)
    size = table["fixed_bytes"] + sum(layer["bytes"]["4"] for layer in table["layers"])
    return {"sens": sens, "table": table, "target": ["--target-mb", size / 2**20], "size": size}


def test_allocations_are_measured(tmp_path: Path, tiny_archive: Path, many_tones: Path, measured: dict) -> None:
    """--measure, --refine and --max-divergence through to the packed file, which measures the same."""
    sens, out = measured["sens"], tmp_path / "a.json"
    for options, points in (
        ([*measured["target"], "--measure", tiny_archive], 5),
        ([*measured["target"], "--measure", tiny_archive, "--points", 2, "--data", many_tones], 2),
        ([*measured["target"], "--refine", tiny_archive, "--minutes", 0.02, "--points", 0], 0),
        (["--max-divergence", 0.05, "--measure", tiny_archive, "--points", 0], 0),
    ):
        found = result_json("allocate", sens, *options, "--out", out)
        assert json.loads(out.read_text()) == found
        assert found["predicted_bytes"] <= found["target_bytes"] <= max(measured["size"], found["predicted_bytes"])
        assert len(found["measured"]) >= points + 1
        left = measured["table"]["data"]["left_seconds"] - found["refinement"].get("seconds", 0)
        assert found["measured_seconds"] == pytest.approx(left, abs=2e-3) and left > 3
        assert bool(found["refinement"]) == ("--refine" in options)
        if "--max-divergence" in options:
            assert found["measured_kl"] <= 0.05
        packed = result_json("pack", tiny_archive, "--allocation", out, "--out", tmp_path / "m")
        assert packed["size_bytes"] == found["predicted_bytes"] == (tmp_path / "m").stat().st_size
        assert packed["measured_kl"] == pytest.approx(found["measured_kl"], rel=0.05)  # norms in half precision
    predicted = result_json("allocate", sens, "--max-divergence", 0.05, "--out", out)
    assert predicted["predicted_kl"] <= 0.05 and predicted["measured"] == [] and predicted["measured_kl"] is None


def test_measured_divergences_are_shown(tmp_path: Path, tiny_archive: Path, many_tones: Path, measured: dict) -> None:
    sens, out, small = measured["sens"], tmp_path / "a.json", tmp_path / "m"
    done = run("allocate", sens, *measured["target"], "--out", out)
    assert done.exit_code == 0 and "not measured (--measure CKPT does)" in done.stdout
    done = run("allocate", sens, *measured["target"], "--refine", tiny_archive, "--minutes", "0.002", "--out", out)
    kl = f"{json.loads(out.read_text())['measured_kl']:.4g}"
    assert done.exit_code == 0 and f"measured {kl} (all layers together" in done.stdout and "refined by " in done.stdout
    done = run("pack", tiny_archive, "--allocation", out, "--out", small)
    assert done.exit_code == 0 and "rounding gptq; divergence, nats per frame: predicted " in done.stdout
    done = run("pack", tiny_archive, "--bits", "4", "--data", many_tones, "--seconds", "1", "--out", small)
    assert (
        done.exit_code == 0 and "rounding gptq" in done.stdout and "that the sensitivities have not seen" in done.stdout
    )
    done = run("pack", tiny_archive, "--bits", "4", "--out", small)
    assert done.exit_code == 0 and "rounding nearest; divergence, nats per frame: not measured: no cal" in done.stdout


def test_files_of_an_older_version(tmp_path: Path, tiny_archive: Path, chain: dict, measured: dict) -> None:
    """Without the keys that came later: they load, allocate and pack as they did."""
    table = {key: value for key, value in measured["table"].items() if key != "fingerprint"}
    table["quantizer"] = {"scheme": "asymmetric", "granularity": "group:64", "clip": "mse"}
    table["data"] = {key: table["data"][key] for key in ("path", "utterances", "frames")}
    later = ("interval", "float_bytes")
    table["layers"] = [{key: value for key, value in layer.items() if key not in later} for layer in table["layers"]]
    sens, alloc, out = (tmp_path / name for name in ("s.json", "a.json", "m"))
    sens.write_text(json.dumps(table))
    new = result_json("allocate", measured["sens"], *measured["target"], "--out", tmp_path / "new.json")
    old = result_json("allocate", sens, *measured["target"], "--out", alloc)
    assert old["layers"] == new["layers"] and old["frontier"] == new["frontier"]
    for key in ("measured", "measured_kl", "measured_seconds", "refinement", "frontier_note", "fingerprint"):
        del old[key]
    alloc.write_text(json.dumps(old))
    done = result_json("pack", tiny_archive, "--allocation", alloc, "--out", out)
    assert done["rounding"] == "nearest" and done["size_bytes"] == out.stat().st_size == new["predicted_bytes"]
    fails(
        "allocate", sens, *measured["target"], "--measure", tiny_archive, "--out", tmp_path / "x",
        words="do not say which audio they were measured on",
    )  # fmt: skip


def test_an_allocation_for_another_model_is_refused(tmp_path: Path, chain: dict, tiny_archive: Path) -> None:
    raw = json.loads((chain["folder"] / "alloc.json").read_text())
    path, out = tmp_path / "alloc.json", tmp_path / "m.safetensors"
    path.write_text(json.dumps(raw | {"model": {"sha256": "0" * 64, "path": "other.nemo"}}))
    fails("pack", tiny_archive, "--allocation", path, "--out", out, words="another checkpoint, other.nemo")
    path.write_text(json.dumps(raw | {"target_bytes": raw["predicted_bytes"] - 1}))
    fails("pack", tiny_archive, "--allocation", path, "--out", out, words="above the allocation's target")
    path.write_text(json.dumps(raw | {"layers": raw["layers"][:-1]}))
    fails("pack", tiny_archive, "--allocation", path, "--out", out, words="no bit-width for decoder")
    assert not out.exists()


def test_a_floor_that_is_given_twice_is_the_larger(tmp_path: Path, chain: dict) -> None:
    for first, second in ((8, 2), (2, 8)):
        keep = ["--keep", f"decoder.*={first}", "--keep", f"decoder.*={second}"]
        done = result_json(
            "allocate", chain["folder"] / "sens.json", "--average-bits", "4", *keep, "--out", tmp_path / "a"
        )
        assert {layer["name"]: layer["bits"] for layer in done["layers"]}["decoder.decoder_layers.0.weight"] == 8


@pytest.mark.parametrize("target", ["1e15", "1e300"])
def test_a_budget_without_bound(tmp_path: Path, chain: dict, target: str) -> None:
    done = result_json("allocate", chain["folder"] / "sens.json", "--target-mb", target, "--out", tmp_path / "a")
    assert done["predicted_kl"] == min(kl for _, kl in done["frontier"])


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path, tiny_archive: Path) -> None:
    (tmp_path / "r[bold]").mkdir()
    done = run("pack", tiny_archive, "--bits", "4", "--out", tmp_path / "r[bold]" / "[a].safetensors")
    assert done.exit_code == 0 and "r[bold]/[a].safetensors" in done.stdout


def test_an_allocation_written_by_hand(tmp_path: Path, chain: dict, tiny_archive: Path) -> None:
    layers = chain["allocation"]["layers"]
    by_hand = {
        "format": "mpq.allocation/1", "target_bytes": 10**6, "predicted_bytes": 5, "predicted_kl": 0.0,
        "average_bits": 4.0, "layers": layers,
    }  # fmt: skip
    (tmp_path / "alloc.json").write_text(json.dumps(by_hand))
    out = tmp_path / "m.safetensors"
    done = result_json("pack", tiny_archive, "--allocation", tmp_path / "alloc.json", "--out", out)
    assert done["size_bytes"] == out.stat().st_size == chain["pack"]["size_bytes"]


def test_a_layer_that_no_data_reach_is_rounded_to_nearest_and_named(tmp_path: Path, tiny_manifest: Path) -> None:
    model, name = tiny_model(), "encoder.layers.1.conv.depthwise_conv.weight"
    state = model.state_dict()
    for part in ("weight", "bias"):
        state[f"encoder.layers.1.conv.pointwise_conv1.{part}"].zero_()
    archive = write_nemo(tmp_path / "dead.nemo", nemo_config(), state)
    sens, alloc, small = (tmp_path / one for one in ("sens.json", "alloc.json", "small.safetensors"))
    measured = run("sensitivity", archive, "--data", tiny_manifest, "--bits", "2,8", "--seconds", 2, "--out", sens)
    said = f"rounded to nearest, because no calibration data reach them: {name}"
    assert measured.exit_code == 0 and said in measured.stdout
    assert json.loads(sens.read_text())["unreached"] == [name]
    assert result_json("allocate", sens, "--average-bits", 4, "--out", alloc)
    packed = run("pack", archive, "--allocation", alloc, "--out", small)
    assert packed.exit_code == 0 and said in packed.stdout
    assert result_json("pack", archive, "--allocation", alloc, "--out", small)["unreached"] == [name]
    width = {layer["name"]: layer["bits"] for layer in json.loads(alloc.read_text())["layers"]}[name]
    spec = QuantSpec(width, granularity="group:64", rounding="nearest")
    weight = load_model(small).state_dict()[name]
    assert torch.equal(weight, fake_quantize(model.state_dict()[name], spec))
