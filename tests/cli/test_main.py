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
from tiny_cli import fails, result_json, run
from tiny_training import write_recipe, write_speech

from mpq.cli.main import main

COMMANDS = sorted(main.commands)


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


def test_results_on_stdout_are_those_in_the_files(chain: dict) -> None:
    folder = chain["folder"]
    for name, key in (("sens.json", "sensitivity"), ("alloc.json", "allocation"), ("comparison.json", "comparison")):
        assert json.loads((folder / name).read_text()) == chain[key]
    for name in ("fp32", "small"):
        assert json.loads((folder / name / "metrics.json").read_text()) == chain[name]
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            "hyp.trn",
            "keys.json",
            "metrics.json",
            "ref.trn",
        ]
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
    fails("inspect", tiny_manifest, words="not a format that mpq reads; expected a NeMo archive (.nemo)")
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
    assert "joint search needs a head that this model does not have" in done.stderr
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


def test_devices_and_pipes_are_refused_at_once(tiny_archive: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data.jsonl").write_text('{"audio_filepath": "pipe", "text": "a"}\n')
    for special in ("/dev/zero", tmp_path / "pipe"):
        for arguments in (
            ("inspect", special),
            ("evaluate", tiny_archive, "--data", special, "--out", tmp_path / "out"),
            ("allocate", special, "--average-bits", "3", "--out", tmp_path / "a.json"),
            ("run", special, "--out", tmp_path / "out"),
            ("compare", "--ref", special, "--a", special, "--b", special),
        ):
            fails(*arguments, words=f"{special}: a device or a pipe; expected a file")
    done = run("evaluate", tiny_archive, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "pipe: a device or a pipe" in done.stderr


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    for length in (300, 5000):  # above NAME_MAX, above PATH_MAX
        fails("inspect", "x" * length, words="File name too long; give a shorter name")
        fails("evaluate", "x" * length, "--data", "x", "--out", tmp_path / "out", words="File name too long")
    assert not list(tmp_path.iterdir())
