"""`mpq run` on a tiny recipe, and what it said and left behind."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mpq.cli.main import main
from mpq.config import Recipe

STAGES = tuple(Recipe().stages)
TARGET_MB = 0.0105
FILES = (
    *("train/model.safetensors", "train/training.json", "train/recipe.json", "train/log.jsonl"),
    *(f"{model}/{name}/{file}" for model in ("float", "packed") for name in ("one", "two")
      for file in ("ref.trn", "hyp.trn", "keys.json", "metrics.json")),
    *("sensitivity.json", "allocation.json", "packed.safetensors", "comparison-one.json", "comparison-two.json"),
    "run.json",
)  # fmt: skip
SKIPPED = dict.fromkeys(STAGES, "skipped")


def mpq_run(recipe: Path, out: Path, *options: object) -> Result:
    return CliRunner().invoke(main, ["run", str(recipe), "--out", str(out), "--device", "cpu", *map(str, options)])


def said(done: Result) -> list[str]:
    """Returns what `mpq run` said of its stages, on stderr."""
    return [line.removeprefix("mpq run: ") for line in done.stderr.splitlines() if line.startswith("mpq run: ")]


def actions(recipe: Path, out: Path, *options: object) -> dict[str, str]:
    """Returns what a run did with each stage, as its JSON and its table say."""
    done = mpq_run(recipe, out, "--json", *options)
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert raw["format"] == "mpq.run/1" and raw["dry_run"] == ("--dry-run" in options)
    for stage in raw["stages"]:  # each stage says on stderr what becomes of it
        line = next(line for line in said(done) if line.startswith(f"{stage['name']}: "))
        assert stage["reason"] in line and line.endswith("; skipped") == (stage["action"] == "skipped")
    return {stage["name"]: stage["action"] for stage in raw["stages"]}


def stages(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())["stages"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Returns what tells files that were left alone from those that were written again; run.json is left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {
        str(one.relative_to(folder)): (one.read_bytes(), one.stat().st_ino, one.stat().st_mtime_ns) for one in files
    }
