"""`mpq finetune` as a user runs it: help, options, faults, what is printed, what is in the folder."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from tiny_finetune import OPTIONS, Spy, four, speech, tune, with_data
from tiny_runs import stamps
from tiny_training import log_of

from mpq.cli.main import main
from mpq.config import FinetuneAugmentConfig, FinetuneConfig, Recipe
from mpq.config.describe import describe_section
from mpq.finetuning.loop import Finetuner
from mpq.finetuning.record import FinetuneResult
from mpq.loading import load_model
from mpq.pipeline.read import make_recipe

__all__ = ["four", "speech"]  # fixtures

KEYS = describe_section(FinetuneConfig)


def command(speech: Path, four: Path, out: Path, *more: object) -> Result:
    words: list[object] = ["finetune", speech / "hybrid", "--allocation", four, "--train", speech / "train.jsonl"]
    words += ["--dev", speech / "dev.jsonl", "--out", out, "--device", "cpu", *more]
    return CliRunner().invoke(main, list(map(str, words)))


def options(**changes: Any) -> list[str]:
    """Returns the tests' options as a user gives them."""
    pairs = ((f"--{key.replace('_', '-')}", json.dumps(value)) for key, value in (OPTIONS | changes).items())
    return [word.strip('"') for pair in pairs for word in pair]


def refusal(done: Result) -> str:
    """Returns the one line of a refusal."""
    assert done.exit_code == 2 and done.stdout == "", done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("mpq: ")
    return line.removeprefix("mpq: ")


# ---- options


def test_help_has_every_key_with_its_default() -> None:
    text = " ".join(CliRunner().invoke(main, ["finetune", "--help"], terminal_width=200).stdout.split())
    for key, _, default, description in KEYS:
        flag = f"--{key.replace('_', '-')} "
        assert flag in text, flag
        after = text.partition(flag)[2]
        assert " ".join(description.split()) in after, key
        if default:
            assert f"Default: {default}." in after, key


@pytest.mark.parametrize("key", [row[0] for row in KEYS])
def test_a_bad_value_is_one_line_that_names_the_option(key: str, speech: Path, four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for value in ("-3", "nonsense", "[1, 2, 3]"):
        line = refusal(command(speech, four, out, f"--{key.replace('_', '-')}", value))
        assert re.match(rf"mpq finetune: \[finetune\] {key}(\[\d\])?: expected ", line), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--alpha", "[30, 20]"], "[finetune] alpha: expected first and last, rising, got [30"),
        (["--anneal", "[0.5, 0.2]"], "[finetune] anneal: expected first and last, rising"),
        (["--set", "finetune_augment.speed=[]"], "[finetune_augment] speed: expected one factor or more"),
        (["--set", "finetune_augment.speed=[0.923]"], "[finetune_augment] speed: expected two decimals at most"),
        (["--set", "finetune_augment.level_db=[3, 1]"], "[finetune_augment] level_db: expected lowest and highest"),
        (["--set", "finetune_augment.snr_db=[3, 1]"], "[finetune_augment] snr_db: expected lowest and highest"),
        (["--set", "finetune_augment.sped=[1]"], "[finetune_augment] sped: unknown key; did you mean speed?"),
        (["--set", "finetune.epochs=0"], "[finetune] epochs: expected 1 or more, got 0"),
        (["--set", "epochs=3"], "epochs: unknown key"),
        (["--set", "nonsense"], "--set: expected section.key=value, got 'nonsense'"),
        (["--channel", "left"], "[data] channel: expected text of the form"),
        (["--seed", "-1"], "seed: expected 0 or more"),
    ],
)
def test_faults_that_no_single_key_shows(
    words: list[str], expected: str, speech: Path, four: Path, tmp_path: Path
) -> None:
    assert refusal(command(speech, four, tmp_path / "out", *words)).startswith(f"mpq finetune: {expected}")


def test_faults_are_told_together(speech: Path, four: Path, tmp_path: Path) -> None:
    done = command(speech, four, tmp_path / "out", "--epochs", 0, "--select", "best", "--set", "finetune.x=1")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 3


def test_files_that_are_not_there(speech: Path, four: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"audio_filepath": "gone.wav", "text": "a"}\n')
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    gone = tmp_path / "gone"
    usual = {"allocation": four, "train": speech / "train.jsonl", "dev": speech / "dev.jsonl"}
    for key, path, words in (
        ("model", gone, "gone: no such file"),
        ("model", tmp_path, "a folder without model.safetensors"),
        ("allocation", gone, "gone: "),
        ("allocation", broken, "broken.json: "),
        ("train", gone, "gone: "),
        ("train", lacking, "gone.wav"),
        ("dev", gone, "gone: "),
        ("dev", lacking, "gone.wav"),
    ):
        given = usual | {key: path}
        arguments = ["finetune", str(given.pop("model", speech / "hybrid")), "--out", str(tmp_path / "out")]
        arguments += [word for option, value in given.items() for word in (f"--{option}", str(value))]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2 and done.stdout == "" and words in done.stderr, (key, done.output)
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "the folder cannot be made" in refusal(command(speech, four, tmp_path / "file/out"))
    noise = command(speech, four, tmp_path / "out", "--set", 'finetune_augment.noise=["street"]')
    assert refusal(noise).startswith(f"noise: {Path.cwd() / 'street'}: no recording; expected .wav")


# ---- a run


@pytest.fixture(scope="module")
def done(speech: Path, four: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run with --json, and its folder."""
    out = tmp_path_factory.mktemp("cli") / "out"
    more = ["--json", "--seed", 3, "--set", "finetune_augment.speed=[0.9,1.1]", "--set", "finetune.betas=[0.5,0.9]"]
    return command(speech, four, out, *options(), *more), out


def test_json_is_the_file_and_the_log_goes_to_stderr(done: tuple[Result, Path]) -> None:
    result, out = done
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((out / "finetune.json").read_text()) and printed["format"] == "mpq.finetune/1"
    assert json.loads(json.dumps(FinetuneResult.load(out / "finetune.json").to_json())) == printed
    lines = result.stderr.splitlines()
    assert lines[0].startswith("mpq: epoch 0/2: starting weights, dev ")
    assert [line[:14] for line in lines[1:3]] == ["mpq: epoch 1/2", "mpq: epoch 2/2"]
    names = {path.name for path in out.iterdir()} - {"learning_curve.svg"}
    assert names == {"packed.safetensors", "float.safetensors", "recipe.json", "log.jsonl", "finetune.json"}
    log = log_of(out)
    assert [line["epoch"] for line in log if "dev_loss" in line] == [0, 1, 2]
    assert [line["step"] for line in log if "rate" in line] == list(range(1, log[-1]["step"] + 1))


def test_options_are_those_of_the_schema_where_none_is_given(
    done: tuple[Result, Path], speech: Path, four: Path
) -> None:
    recipe = Recipe.model_validate_json((done[1] / "recipe.json").read_text())
    assert recipe.finetune == FinetuneConfig(**OPTIONS, betas=(0.5, 0.9)) and recipe.seed == 3
    assert recipe.finetune_augment == FinetuneAugmentConfig(speed=[0.9, 1.1])
    assert recipe.data.train == [str(speech / "train.jsonl")] and recipe.data.dev == str(speech / "dev.jsonl")
    for key, _, default, _ in KEYS:
        value = getattr(FinetuneConfig(), key)
        said = tomllib.loads(f"x = {default}")["x"] if default else None
        assert said == (list(value) if isinstance(value, tuple) else value), key


def test_the_same_options_in_python_give_the_same_file(
    done: tuple[Result, Path], speech: Path, four: Path, tmp_path: Path
) -> None:
    recipe = with_data(speech, seed=3, finetune_augment={"speed": [0.9, 1.1]}, betas=[0.5, 0.9])
    tune(speech / "hybrid", four, recipe, tmp_path / "out")
    assert (tmp_path / "out/packed.safetensors").read_bytes() == (done[1] / "packed.safetensors").read_bytes()


def test_a_finished_folder_answers_at_once_and_in_words(done: tuple[Result, Path], speech: Path, four: Path) -> None:
    before = stamps(done[1])
    more = ["--seed", 3, "--set", "finetune_augment.speed=[0.9,1.1]", "--set", "finetune.betas=[0.5,0.9]"]
    again = command(speech, four, done[1], *options(), *more)
    result = FinetuneResult.load(done[1] / "finetune.json")
    assert again.exit_code == 0 and again.stderr == "" and stamps(done[1]) == before
    for words in (str(result.sizes[0].size_bytes), f"{result.sizes[0].ratio:.2f}", "kept epochs 2 of 2", "seed 3",
                  "4 utterances", "4 with a transcript"):  # fmt: skip
        assert words in again.stdout, words
    other = command(speech, four, done[1], *options())
    assert "holds a finished training with other options or data (its recipe.json has them)" in refusal(other)


def test_other_commands_take_the_folder(done: tuple[Result, Path], speech: Path, tmp_path: Path) -> None:
    inspected = CliRunner().invoke(main, ["inspect", str(done[1]), "--json"])
    assert inspected.exit_code == 0
    assert json.loads(inspected.stdout)["file_bytes"] == (done[1] / "packed.safetensors").stat().st_size
    words = ["evaluate", done[1], "--data", speech / "dev.jsonl", "--out", tmp_path / "eval", "--json", "--quiet"]
    found = CliRunner().invoke(main, list(map(str, words)))
    assert json.loads(found.stdout)["wer"] == FinetuneResult.load(done[1] / "finetune.json").sizes[0].wer


def test_little_and_faulty_data(speech: Path, four: Path, tmp_path: Path) -> None:
    """No utterance, one, several manifests, one without words, and what is left out and counted."""
    empty, one, wordless = (tmp_path / f"{name}.jsonl" for name in ("empty", "one", "wordless"))
    empty.write_text("")
    entry = {"audio_filepath": str(speech / "train-0.wav")}
    one.write_text(json.dumps(entry) + "\n")
    wordless.write_text(json.dumps(entry | {"text": ""}) + "\n")
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text(json.dumps({"audio_filepath": str(tmp_path / "gone.wav")}) + "\n")

    def run(*more: object, train: Path = one, dev: Path = speech / "dev.jsonl", out: str = "out") -> Result:
        words = ["finetune", speech / "hybrid", "--allocation", four, "--train", train, "--dev", dev]
        words += ["--out", tmp_path / out, *options(epochs=1), "--json", "--quiet", *more]
        return CliRunner().invoke(main, list(map(str, words)))

    assert "empty.jsonl: " in refusal(run(train=empty)) and "empty.jsonl: " in refusal(run(dev=empty))
    single = json.loads(run(out="single").stdout)
    assert single["utterances"] == 1 and single["transcribed"] == 0 and single["epochs"][-1]["step"] == 1
    several = json.loads(run("--train", speech / "train.jsonl", "--train", lacking, "--skip-bad", out="b").stdout)
    assert several["utterances"] == 5 and several["skipped"] == 1 and several["transcribed"] == 4
    short = run("--set", "data.max_seconds=1", train=speech / "train.jsonl", out="c")
    assert json.loads(short.stdout)["too_long"] == 1  # "bed cab", 1.4 s
    quiet = run("--select", "wer", dev=wordless, out="d")
    assert quiet.exit_code == 0 and json.loads(quiet.stdout)["sizes"][0]["wer"] is None


def test_speed_and_channel_reach_the_data(speech: Path, four: Path, tmp_path: Path) -> None:
    """A text that fits its audio, but not at the highest speed; files with two channels, of which one is taken."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"audio_filepath": str(speech / "train-0.wav"), "text": "abcabcabcabc"}) + "\n")
    told = [*options(epochs=1, transcript_weight=0.5), "--quiet", "--json"]
    recipe = ["finetune", speech / "hybrid", "--allocation", four, "--dev", speech / "dev.jsonl"]

    def run(out: str, *more: object) -> Result:
        return CliRunner().invoke(main, list(map(str, [*recipe, "--out", tmp_path / out, *more])))

    assert run("slow", "--train", long, *told).exit_code == 0
    done = run("fast", "--train", long, *told, "--set", "finetune_augment.speed=[1.0,2.0]")
    assert done.exit_code == 2 and "too long a text" in done.stderr and "at the highest speed" in done.stderr
    folder = tmp_path / "stereo"
    folder.mkdir()
    for name in ("train.jsonl", "dev.jsonl"):
        (folder / name).write_text((speech / name).read_text())
    for path in speech.glob("*.wav"):
        samples, rate = soundfile.read(path, dtype="int16")
        soundfile.write(folder / path.name, np.stack((samples[::-1], samples), axis=1), rate)
    recipe[-1] = folder / "dev.jsonl"
    quiet = [*options(epochs=1), "--quiet", "--json", "--train", folder / "train.jsonl"]
    assert "channel" in run("error", *quiet).stderr
    found = json.loads(run("second", *quiet, "--channel", "1").stdout)
    plain = command(speech, four, tmp_path / "plain", *options(epochs=1), "--quiet", "--json")
    for name in ("sizes", "epochs"):
        for one, other in zip(found[name], json.loads(plain.stdout)[name], strict=True):
            assert {key: one[key] for key in one if key not in ("seconds", "path")} == {
                key: other[key] for key in other if key not in ("seconds", "path")
            }


def test_divergence_is_one_line_and_exit_status_2(
    speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, prepare = Spy().watch(monkeypatch), Finetuner.prepare_update

    def spoiling(tuner: Finetuner) -> None:
        prepare(tuner)
        if tuner.step == 1:
            tuner.weights.latents[-1].data[:] = torch.inf

    monkeypatch.setattr(Finetuner, "prepare_update", spoiling)
    line = refusal(command(speech, four, tmp_path / "out", *options(), "--quiet"))
    assert (
        "update 2" in line
        and "the weight decoder.output.weight is not finite" in line
        and f"are in {tmp_path / 'out/packed.safetensors'}" in line
    )
    assert torch.equal(load_model(tmp_path / "out").state_dict()["ctc.weight"], spy.seen[0][0]["ctc.weight"])


def test_an_interruption_says_that_it_goes_on(
    speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(tuner: Finetuner) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Finetuner, "finish_update", interrupting)
    stopped = command(speech, four, tmp_path / "out", *options(), "--quiet")
    assert stopped.exit_code == 130 and stopped.stdout == "" and "goes on where it stopped" in stopped.stderr


# ---- where the options come from


def test_make_recipe_resolves_paths_and_prefers_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = {"data": {"train": ["a.jsonl"], "dev": "/elsewhere/b.jsonl"}, "finetune": {"epochs": 3}}
    recipe = make_recipe(table, ["finetune.epochs=7", 'finetune_augment.noise=["white","n"]', "seed=5"], "mpq x")
    assert recipe.finetune.epochs == 7 and recipe.seed == 5 and recipe.stages == []
    assert recipe.path(recipe.data.train[0]) == tmp_path / "a.jsonl"
    assert str(recipe.path(recipe.data.dev)) == "/elsewhere/b.jsonl"
    assert recipe.finetune_augment.noise == ["white", str(tmp_path / "n")] and recipe.augment.noise == []
    assert make_recipe({}, [], "mpq x") == Recipe(stages=[], data={"root": str(tmp_path)})


def test_an_allocation_that_is_given_twice(speech: Path, four: Path, tmp_path: Path) -> None:
    done = command(speech, four, tmp_path / "out", "--allocation", four, *options(epochs=1))
    assert done.exit_code == 2 and "another allocation is named four too" in refusal(done)


@pytest.mark.parametrize("setting", ["augment.speed=[0.9]", "train.epochs=3", "stages=[]", "checkpoint=other"])
def test_sections_that_the_command_does_not_read_are_refused(
    setting: str, speech: Path, four: Path, tmp_path: Path
) -> None:
    done = command(speech, four, tmp_path / "out", "--set", setting)
    section = setting.partition("=")[0].partition(".")[0]
    expected = f"mpq finetune does not read {section}; it reads data, finetune, finetune_augment"
    assert refusal(done) == f"--set {setting}: {expected}"
