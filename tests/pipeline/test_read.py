"""Recipes: all faults at once and each on a line of its own, --set, and paths."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_recipes import assert_faults, faults, good, known, write
from tiny_training import write_speech

from mpq.cli.main import main
from mpq.config import Recipe
from mpq.pipeline.read import load_recipe

__all__ = ["good"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]


def test_faults_of_every_kind_are_told_together(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        sed = 3
        checkpoint = "x.nemo"
        [data]
        train = ["no.jsonl", "gone"]
        test = { one = "not.jsonl", "a/b" = "not.jsonl" }
        max_seconds = "x"
        epochs = 3
        [model]
        laers = 3
        width = 250
        kernel_size = 4
        ffn_width = [3, "x", -1]
        ffn2_width = "a"
        ffn_rank = true
        ffn2_rank = [1, 2]
        subsampling_padding = 2
        [train]
        epochs = 1.5
        betas = [0.9]
        semi_orthogonal = "XX"
        learning_rate = nan
        precision = "fp8"
        warmup_steps = -1
        [augment]
        noise = ["white", "street.wav"]
        snr_db = [20, 3]
        speed = [3, 0.1]
        [decode]
        beam_size = 0
        [sensitivity]
        bits = [9, 3.5]
        granularity = "group:0"
        clip = "best"
        [allocate]
        keep = { "dec*" = 0 }
        target_mb = 3
        average_bits = 4
        [modl]
        width = 3
        """,
    )
    root = tmp_path.resolve()
    assert set(faults(path)) == {
        '[data] max_seconds: expected a number, got "x"',
        "[data] epochs: unknown key; did you mean that of [train] or [search] or [finetune]? known: " + known("data"),
        "[model] laers: unknown key; did you mean layers? known: " + known("model"),
        '[model] ffn_width[1]: expected a whole number, got "x"',
        "[model] ffn_width[2]: expected 1 or more, got -1",
        '[model] ffn2_width: expected a whole number or a list, got "a"',
        "[model] ffn_rank: expected a whole number or a list, got true",
        "[model] subsampling_padding: expected 0 or 1, got 2",
        "[train] epochs: expected a whole number, got 1.5",
        "[train] betas: expected an item more, got [0.9]",
        '[train] semi_orthogonal: expected text of the form [SL]{4}, got "XX"',
        "[train] learning_rate: expected a finite number, got NaN",
        "[train] precision: expected 'auto', 'float32', 'bfloat16' or 'float16', got \"fp8\"",
        "[train] warmup_steps: expected 0 or more, got -1",
        "[augment] speed[0]: expected 2 or less, got 3",
        "[augment] speed[1]: expected 0.5 or more, got 0.1",
        "[decode] beam_size: expected 1 or more, got 0",
        "[sensitivity] bits[0]: expected 8 or less, got 9",
        "[sensitivity] bits[1]: expected a whole number, got 3.5",
        '[sensitivity] granularity: expected text of the form (tensor|channel|group:[1-9][0-9]*), got "group:0"',
        '[sensitivity] clip: expected text of the form (none|mse|mae|percentile:[0-9.]+), got "best"',
        "[allocate] keep.dec*: expected more than 0, got 0",
        "sed: unknown key; did you mean seed? known: " + known(""),
        "modl: unknown key; did you mean model? known: " + known(""),
        "checkpoint: the stage train makes one; leave one of the two out",
        '[data] dev: train.select = "wer" needs held-out data; give them, or "last"',
        "[model] heads: expected a divisor of width, 250; got 4",
        "[model] decoder_heads: expected a divisor of width, 250; got 4",
        "[model] kernel_size: expected an odd number, got 4",
        "[model] ffn2_rank: expected one number for each of the 12 blocks, got 2",
        "[augment] snr_db: expected lowest and highest, got [20.0, 3.0]",
        "[allocate] target_mb: expected exactly one of target_mb, target_ratio, average_bits, max_divergence; got "
        "target_mb, average_bits",
        '[data] test."a/b": expected a name of letters, digits, _, - and . (it names a folder)',
        f"[data] train[0]: {root}/no.jsonl: no such file or folder",
        f"[data] train[1]: {root}/gone: no such file or folder",
        f"[augment] noise: {root}/street.wav: no such file or folder",
        f"[data] test.one: {root}/not.jsonl: no such file or folder",
        f"[data] test.a/b: {root}/not.jsonl: no such file or folder",
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[]"], ["stages: expected one or more of train"]),
        (['stages=["train","cook"]'], ["stages[1]: expected 'train', 'search', 'evaluate', 'sensitivity',"]),
        (["stages=train"], ['stages: expected a list, got "train"']),
        (["data.dev="], ['[data] dev: expected text that is not empty, got ""']),
        (["data.channel=left"], ["[data] channel: expected text of the form (error|mix|[0-9]+)"]),
        (["train.select=last", "train.patience=2"], ["[train] patience: the last epoch always counts as best"]),
        (["finetune.select=last", "finetune.patience=2"], ["[finetune] patience: the last epoch always counts"]),
        (["finetune.select=best"], ["[finetune] select: expected 'wer', 'loss' or 'last', got"]),
        (["augment.snr_db=[1,2,3]"], ["[augment] snr_db: expected 2 items, got [1, 2, 3]"]),
        (["train.betas=[0.9,1]"], ["[train] betas[1]: expected less than 1"]),
        (["seed=-1"], ["seed: expected 0 or more, got -1"]),
        (["seed=true"], ["seed: expected a whole number, got true"]),
        (["train=3"], ["train: expected a section, got 3"]),
        (["data.test=x.jsonl"], ['[data] test: expected a table, got "x.jsonl"']),
        (["data.skip_bad=1"], ["[data] skip_bad: expected true or false, got 1"]),
        (["seed"], ["--set: expected section.key=value, got 'seed'"]),
        (["=3"], ["--set: expected section.key=value, got '=3'"]),
        (["data..x=3"], ["--set: expected section.key=value, got 'data..x=3'"]),
        (["seed.x=3"], ["--set seed.x: seed is no section"]),
        (["model.epochs=3", "seed=x"], ["[model] epochs: unknown key; did you mean that of [tr", "seed: expected"]),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(good: Path, overrides: list[str], words: list[str]) -> None:
    assert_faults(good, overrides, words)


def test_what_does_not_hide_behind_a_fault(good: Path) -> None:
    """A key at fault silences what follows from it, and nothing else."""
    assert len(faults(good, "model.width=x", "model.heads=7")) == 1  # 7 divides nothing that is known
    assert len(faults(good, "data.train=3", "train.ctc_weight=1", "model.kernel_size=2")) == 3
    assert len(faults(good, "data.tset.a=3", "model.heads=7")) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = [", "not TOML: "),
        (b"a = 1\na = 2", "not TOML: "),
        (b"a = " + b"[" * 100000, "not TOML: "),
        (b"seed = " + b"9" * 10000, "not TOML: "),
        (b"# \xff", "expected UTF-8 text, got byte 0xff at 2"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "r.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    for command in ("run", "train"):
        (line,) = faults(path, command=command)
        assert line.startswith(words)
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert done.exit_code == 2 and f"mpq: {path}: {words}" in done.stderr
    gone = tmp_path / "gone.toml"
    assert faults(gone) == ["no such file"]


def test_values_of_every_kind_can_be_set(good: Path) -> None:
    recipe = load_recipe(
        good,
        [
            "seed=7", "train.learning_rate=2e-4", "features.pitch=true", "train.precision=float32",
            'decode.method="prefix"', "sensitivity.bits=[2, 4]",
            "data.test.two=dev.jsonl", 'allocate={target_mb=2, keep={"dec*"=8}}',
            "train.betas=[0.8, 0.9]", "train.save_minutes = 3", "data.max_seconds=1", "train.epochs=1",
            "train.epochs=2",
        ],
    )  # fmt: skip
    assert (recipe.seed, recipe.train.learning_rate, recipe.features.pitch) == (7, 2e-4, True)
    assert (recipe.train.precision, recipe.decode.method, recipe.sensitivity.bits) == ("float32", "prefix", [2, 4])
    assert recipe.data.test == {"one": "dev.jsonl", "two": "dev.jsonl"}
    assert (recipe.allocate.target_mb, recipe.allocate.average_bits, recipe.allocate.keep) == (2, None, {"dec*": 8})
    assert (recipe.train.betas, recipe.train.save_minutes, recipe.data.max_seconds) == ((0.8, 0.9), 3, 1)
    assert recipe.train.epochs == 2  # the last one counts
    assert recipe.model == Recipe().model


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_speech(tmp_path / "corpus")
    (tmp_path / "recipes").mkdir()
    text = '[data]\nroot = "../corpus"\ntrain = ["train.jsonl"]\n[augment]\nnoise = ["white", "train-0.wav"]\n'
    path = write(tmp_path / "recipes", "\ufeff" + text.replace("\n", "\r\n"))
    for folder in (tmp_path, tmp_path / "recipes", Path("/")):
        monkeypatch.chdir(folder)
        recipe = load_recipe(Path(os.path.relpath(path)), ["train.select=last"], stages=["train"])
        assert recipe.path("train.jsonl") == tmp_path.resolve() / "corpus/train.jsonl"
        assert recipe.augment.noise == ["white", str(tmp_path.resolve() / "corpus/train-0.wav")]
    recipe = load_recipe(path, ["checkpoint=../x.nemo"], stages=[], need_files=False)
    assert recipe.checkpoint == str(tmp_path.resolve() / "x.nemo")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_hold(path: Path) -> None:
    assert load_recipe(path, need_files=False).stages


def test_a_recipe_without_anything_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, ""), stages=[]).model_dump(exclude={"data"}) == (
        Recipe(stages=[]).model_dump(exclude={"data"})
    )
