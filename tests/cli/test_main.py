"""Every command as a user runs it: exit status, streams, files; the whole chain on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_training import write_recipe, write_speech

from mpq.cli.main import main
from mpq.loading import load_model
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec

COMMANDS = sorted(main.commands)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def result_json(*arguments: object) -> dict:
    done = run(*arguments, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert "Example" in done.stdout and f"mpq {name} " in done.stdout
    for option in ("--json", "--quiet", "--device", "--seed"):
        assert option in done.stdout
    assert all(parameter.help for parameter in main.commands[name].params if isinstance(parameter, click.Option))


def test_every_command_is_documented() -> None:
    docs = Path(__file__).resolve().parents[2]
    text = (docs / "docs/cli.md").read_text() + (docs / "README.md").read_text()
    keys = {}
    for section in ("finetune", "search"):
        _, _, rest = (docs / "docs/recipes.md").read_text().partition(f"## `[{section}]`")
        keys[section] = rest.partition("\n## ")[0]
        assert f"Every key of `[{section}]` is an option" in " ".join(text.split())
    for name in COMMANDS:
        assert f"mpq {name}" in text
        for parameter in main.commands[name].params:
            if isinstance(parameter, click.Option):
                is_key = f"| `{parameter.name}` |" in keys.get(name, "")
                assert parameter.opts[0] in text or is_key, f"{name} {parameter.opts[0]}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_archive: Path, tiny_manifest: Path) -> dict:
    """The README's six commands on the tiny model; the JSON that each printed."""
    folder = tmp_path_factory.mktemp("chain")
    sens, alloc, small = folder / "sens.json", folder / "alloc.json", folder / "small.safetensors"
    found = {"folder": folder}
    data = ["--data", tiny_manifest]
    found["fp32"] = result_json("evaluate", tiny_archive, *data, "--out", folder / "fp32")
    found["sensitivity"] = result_json("sensitivity", tiny_archive, *data, "--bits", "2,4,8", "--out", sens)
    found["target"] = sum(
        found["sensitivity"]["layers"][i]["bytes"]["4"] for i in range(len(found["sensitivity"]["layers"]))
    )
    found["target"] += found["sensitivity"]["fixed_bytes"]
    found["allocation"] = result_json("allocate", sens, "--target-mb", found["target"] / 2**20, "--out", alloc)
    found["pack"] = result_json("pack", tiny_archive, "--allocation", alloc, "--out", small)
    found["small"] = result_json("evaluate", small, *data, "--out", folder / "small")
    found["comparison"] = result_json("compare", folder / "fp32", folder / "small", "--out", folder / "comparison.json")
    found["inspection"] = result_json("inspect", small)
    return found


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


def test_results_on_stdout_are_those_in_the_files(chain: dict) -> None:
    folder = chain["folder"]
    for name, key in (("sens.json", "sensitivity"), ("alloc.json", "allocation"), ("comparison.json", "comparison")):
        assert json.loads((folder / name).read_text()) == chain[key]
    for name in ("fp32", "small"):
        assert json.loads((folder / name / "metrics.json").read_text()) == chain[name]
        assert sorted(path.name for path in (folder / name).iterdir()) == ["hyp.trn", "metrics.json", "ref.trn"]
    assert chain["comparison"]["a"]["wer"] == chain["fp32"]["wer"]
    assert chain["comparison"]["b"]["wer"] == chain["small"]["wer"]
    assert chain["comparison"]["words"] == chain["fp32"]["words"] == 18
    assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".journal")]


def test_formats_have_their_fixed_keys(chain: dict) -> None:
    keys = {
        "sensitivity": "format model data output method bits quantizer fixed_bytes layers",
        "allocation": "format target_bytes predicted_bytes predicted_kl average_bits layers frontier",
        "comparison": "format alpha utterances words a b mapsswe lossless",
        "inspection": "format family architecture parameters file_bytes layers",
    }
    for name, expected in keys.items():
        assert set(expected.split()) <= set(chain[name])
    assert set(chain["sensitivity"]["layers"][0]) >= {"name", "kind", "shape", "numel", "group", "bytes", "kl"}
    assert set(chain["comparison"]["mapsswe"]) >= {"segments", "mean", "std", "z", "p", "significant", "better"}
    assert chain["inspection"]["family"] == "mpq" and "encoder_blocks" in chain["inspection"]["parameters"]


def test_tables_name_layers_in_full(chain: dict, tiny_archive: Path) -> None:
    for path in (chain["folder"] / "small.safetensors", tiny_archive):
        done = run("inspect", path)
        assert done.exit_code == 0
        assert "encoder.layers.1.conv.depthwise_conv.weight" in done.stdout
    folder = chain["folder"]
    done = run(
        "compare", "--ref", folder / "fp32/ref.trn", "--a", folder / "fp32/hyp.trn", "--b", folder / "small/hyp.trn"
    )
    assert done.exit_code == 0 and "MAPSSWE" in done.stdout and "McNemar" in done.stdout and "Bootstrap" in done.stdout


def test_uniform_and_unquantized_packing(tmp_path: Path, tiny_archive: Path) -> None:
    sizes = [
        result_json("pack", tiny_archive, *options, "--out", tmp_path / "m.safetensors")["size_bytes"]
        for options in (["--bits", 2], ["--bits", 8], [], ["--rest-dtype", "float32"])
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def fails(*arguments: object, words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.startswith("Usage: ") or done.stderr.count("\n") == 1, done.stderr


def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, chain: dict, tiny_archive: Path, tiny_manifest: Path) -> None:
    folder, out = chain["folder"], tmp_path / "out"
    sens, alloc = folder / "sens.json", folder / "alloc.json"
    fails("evaluate", tmp_path / "no.nemo", "--data", tiny_manifest, "--out", out, words="no.nemo: no such file")
    fails("evaluate", tiny_archive, "--data", tmp_path / "no.jsonl", "--out", out, words="no.jsonl: no such file")
    fails("evaluate", tiny_archive, "--out", out, words="--data")
    fails("evaluate", tiny_archive, "--data", tiny_manifest, "--out", out, "--device", "tpu", words="--device")
    fails("sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2,x", "--out", out, words="--bits")
    fails("sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2,9", "--out", out, words="bits: expected")
    fails(
        "sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2", "--out", out, "--granularity", "group:x",
        words="granularity: expected",
    )  # fmt: skip
    fails(
        "sensitivity", folder / "small.safetensors", "--data", tiny_manifest, "--bits", "2", "--out", out,
        words="already packed",
    )  # fmt: skip
    fails("allocate", sens, "--out", out, words="target")
    fails("allocate", sens, "--target-mb", "0.001", "--out", out, words="smallest")
    fails("allocate", sens, "--average-bits", "4", "--keep", "decoder.*", "--out", out, words="PATTERN=BITS")
    fails("allocate", sens, "--average-bits", "4", "--keep", "decodr.*=8", "--out", out, words="decodr.*")
    fails("allocate", alloc, "--average-bits", "4", "--out", out, words='expected "mpq.sensitivity/1"')
    fails("pack", tiny_archive, "--allocation", alloc, "--bits", "4", "--out", out, words="give one of them")
    fails(
        "pack", tiny_archive, "--allocation", alloc, "--scheme", "symmetric", "--out", out, words="--scheme symmetric"
    )
    fails("pack", tiny_archive, "--bits", "4", "--out", tmp_path / "no" / "m", words="does not exist")
    fails("inspect", tiny_manifest, words="not a whole .nemo")
    fails("inspect", tiny_archive, "--device", "cuda:", words="--device")
    fails("allocate", sens, "--average-bits", "4", "--out", tmp_path, words="a folder")
    fails("allocate", sens, "--average-bits", "4", "--out", ".", words="a folder")
    fails("allocate", sens, "--average-bits", "4", "--out", sens, words="would be overwritten")
    fails("pack", tiny_archive, "--bits", "4", "--out", tiny_archive, words="would be overwritten")
    fails("sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2", "--out", tmp_path, words="a folder")
    fails(
        "sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2", "--out", tmp_path / "no" / "s.json",
        words="does not exist",
    )  # fmt: skip
    fails("allocate", sens, "--average-bits", "4", "--keep", "dec*=²", "--out", out, words="PATTERN=BITS")
    for seconds in ("0", "nan"):
        fails(
            "evaluate", tiny_archive, "--data", tiny_manifest, "--out", out, "--batch-seconds", seconds, words="seconds"
        )
    for seconds, words in (("0", "more than 0 seconds"), ("nan", "seconds"), ("inf", "seconds"), ("x", "--seconds: ")):
        for command in (["sensitivity", tiny_archive, "--bits", "2"], ["pack", tiny_archive, "--bits", "4"]):
            fails(*command, "--data", tiny_manifest, "--seconds", seconds, "--out", out, words=words)
    fails("sensitivity", tiny_archive, "--data", tiny_manifest, "--bits", "2", "--out", out, "--method", "x", words="x")
    fails("pack", tiny_archive, "--bits", "4", "--rounding", "gptq", "--out", out, words="--data names some")
    fails("pack", tiny_archive, "--bits", "4", "--data", tmp_path / "no.jsonl", "--out", out, words="no such file")
    fails("pack", tiny_archive, "--allocation", alloc, "--rounding", "nearest", "--out", out, words="made for gptq")
    divergence = ["allocate", sens, "--out", out, "--max-divergence"]
    fails(*divergence, "1e-12", words="max_divergence 1e-12 is less than the smallest possible")
    fails(*divergence, "0", words="max_divergence: expected a positive number")
    fails(*divergence, "1", "--target-mb", "1", words="expected one of")
    fails(*divergence, "0.5", "--refine", tiny_archive, words="moves keep a size")
    fails(*divergence, "0.5", "--measure", tiny_archive, words="no audio is left to measure on")
    measured = ["allocate", sens, "--average-bits", "4", "--out", out, "--measure", tiny_archive]
    fails(*measured, "--refine", tiny_archive, words="give one of them")
    fails(*measured, "--points", "-1", words="is not in the range")
    fails(*measured[:-1], tmp_path / "no.nemo", words="no.nemo: no such file")
    fails(*measured, "--data", tmp_path / "no.jsonl", words="no.jsonl: no such file")
    fails(*measured[:-2], "--refine", tiny_archive, "--minutes", "-1", words="is not in the range")
    for minutes in ("nan", "inf"):
        fails(*measured[:-2], "--refine", tiny_archive, "--minutes", minutes, words="expected a number above 0")
    fails("compare", folder / "fp32", folder / "small", "--alpha", "2", words="alpha")
    fails("compare", folder / "fp32", words="expected two folders")
    fails("compare", folder / "fp32", tmp_path, words="metrics.json")
    assert list(tmp_path.iterdir()) == []


def test_searches_on_the_command_line(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    command = ["evaluate", tiny_archive, "--data", tiny_manifest, "--out", tmp_path / "run"]
    options = ["--decode", "prefix", "--beam-size", 2, "--ctc-weight", "0.25", "--length-bonus", "-1"]
    said = result_json(*command, *options)["decode"]
    assert {key: said[key] for key in ("method", "beam_size", "ctc_weight", "length_bonus")} == {
        "method": "prefix", "beam_size": 2, "ctc_weight": 0.25, "length_bonus": -1.0,
    }  # fmt: skip
    assert result_json(*command)["decode"]["method"] == "greedy"
    command[-1] = tmp_path / "other"
    done = run(*command, "--decode", "joint", "--quiet")
    assert done.exit_code == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "joint search needs an attention decoder" in done.stderr
    fails(*command, "--decode", "beam", words="--decode")
    fails(*command, "--decode", "prefix", "--beam-size", 0, words="beam_size: expected 1 or more")
    fails(*command, "--decode", "joint", "--ctc-weight", 2, words="ctc_weight: expected 0 to 1")


def test_a_recipe_is_trained_and_inspected(tmp_path: Path) -> None:
    """`train` prints what training.json says, `inspect` of the recipe what it says of the checkpoint."""
    write_speech(tmp_path)
    recipe = write_recipe(tmp_path / "r.toml", data__dev="train.jsonl", train__epochs=1)
    done = result_json("train", recipe, "--out", tmp_path / "ckpt", "--seed", "5")
    assert json.loads((tmp_path / "ckpt/training.json").read_text()) == done and done["format"] == "mpq.training/1"
    assert json.loads((tmp_path / "ckpt/recipe.json").read_text())["seed"] == 5
    described, found = result_json("inspect", recipe), result_json("inspect", tmp_path / "ckpt")
    assert described["parameters"] == found["parameters"] == done["parameters"]
    table = run("train", recipe, "--out", tmp_path / "ckpt", "--seed", "5", "--quiet")
    assert table.exit_code == 0 and table.stderr == "" and "train loss" in table.stdout and "1 *" in table.stdout
    fails("train", recipe, "--out", tmp_path / "ckpt", "--seed", "6", "--quiet", words="holds a finished training")


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


def test_faults_of_the_data_are_told_together(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    good = json.loads(tiny_manifest.read_text().splitlines()[0])
    good["audio_filepath"] = str(tiny_manifest.parent / good["audio_filepath"])
    lines = [
        good,
        {"audio_filepath": "no.wav", "text": "a"},
        good | {"utt_id": "digits", "text": "Add 5"},
        {k: v for k, v in good.items() if k != "text"} | {"utt_id": "mute"},
    ]
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("evaluate", tiny_archive, "--data", manifest, "--out", tmp_path / "run", "--quiet")
    assert done.exit_code == 2 and not (tmp_path / "run").exists()
    for number, words in ((2, "no such file"), (3, "'A' (U+0041), '5' (U+0035)"), (4, "has no text")):
        assert any(f"bad.jsonl:{number}: " in line and words in line for line in done.stderr.splitlines()), words
    skipped = result_json("evaluate", tiny_archive, "--data", manifest, "--out", tmp_path / "run", "--skip-bad")
    assert skipped["skipped"] == 3 and skipped["utterances"] == 1


def test_interrupted_by_ctrl_c(tmp_path: Path, deeper_archive: Path, tiny_manifest: Path) -> None:
    command = [sys.executable, "-m", "mpq", "sensitivity", str(deeper_archive), "--data", str(tiny_manifest)]
    command += ["--bits", "1,2,3,4,5,6,7,8", "--out", str(tmp_path / "sens.json")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    journal = tmp_path / "sens.json.journal"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert journal.exists() and not (tmp_path / "sens.json").exists()


def test_an_internal_failure_is_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: dict) -> None:
    import mpq.cli.tables

    monkeypatch.setattr(mpq.cli.tables, "allocation_view", lambda _: 1 / 0)
    done = run("allocate", chain["folder"] / "sens.json", "--average-bits", "4", "--out", tmp_path / "a.json")
    assert done.exit_code == 1 and isinstance(done.exception, ZeroDivisionError)
