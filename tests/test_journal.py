"""Finished results survive a kill at any byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from mpq.cli.main import main
from mpq.errors import MpqError
from mpq.journal import Journal


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.journal", "f")
    assert journal.read() == []
    journal.begin()
    entries = [{"name": "ä", "kl": 0.1}, {"name": "b\n", "kl": 1e-17}]
    for entry in entries:
        journal.append(entry)
    assert Journal(tmp_path / "x.journal", "f").read() == entries
    journal.begin()
    assert journal.read() == entries
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    journal = Journal(path, "f")
    journal.begin()
    entries = [{"n": 1}, {"n": 2}, {"n": 3}]
    for entry in entries:
        journal.append(entry)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        kept = journal.read()
        assert kept == entries[: len(kept)] and len(kept) == max(data[:size].count(b"\n") - 1, 0)
        journal.begin()
        journal.append({"n": 9})
        assert journal.read() == [*kept, {"n": 9}]


def test_results_of_other_work_are_not_overwritten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.journal", "f")
    journal.begin()
    journal.append({"n": 1})
    for action in (Journal(tmp_path / "x.journal", "g").read, Journal(tmp_path / "x.journal", "g").begin):
        with pytest.raises(MpqError, match="other input"):
            action()
    assert journal.read() == [{"n": 1}]


def test_a_foreign_journal_without_results_is_replaced(tmp_path: Path) -> None:
    Journal(tmp_path / "x.journal", "f").begin()
    journal = Journal(tmp_path / "x.journal", "g")
    journal.begin()
    journal.append({"n": 1})
    assert Journal(tmp_path / "x.journal", "g").read() == [{"n": 1}]


def result(*command: str) -> None:
    """Runs a command to its end."""
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output


def kill_when(command: list[str], ready) -> None:
    """Runs a command and kills it (SIGKILL) once `ready` says so; fails if it ends before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline, "the command never got there"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def many(tmp_path_factory: pytest.TempPathFactory, tiny_manifest: Path) -> Path:
    """A manifest with each of the tiny one's utterances 12 times."""
    lines = [json.loads(line) for line in tiny_manifest.read_text().splitlines()]
    rows = [
        line | {"utt_id": f"u{i}-{j}", "audio_filepath": str(tiny_manifest.parent / line["audio_filepath"])}
        for i in range(12)
        for j, line in enumerate(lines)
    ]
    manifest = tmp_path_factory.mktemp("many") / "many.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.mark.parametrize("method", ["kl", pytest.param("fisher", marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_sensitivity(
    method: str, tmp_path: Path, deeper_archive: Path, tiny_manifest: Path, many: Path
) -> None:
    data = {"kl": tiny_manifest, "fisher": many}[method]
    command = ["sensitivity", str(deeper_archive), "--data", str(data), "--seconds", "all"]
    command += ["--method", method, "--bits", "1,2,3,4", "--quiet", "--out"]
    result(*command, str(tmp_path / "whole.json"))
    journal = tmp_path / "cut.json.journal"
    for target in {"kl": (3, 40), "fisher": (40,)}[method]:
        kill_when(
            [sys.executable, "-m", "mpq", *command, str(tmp_path / "cut.json")],
            lambda target=target: lines_of(journal) > target,
        )
    kept = lines_of(journal) - 1
    assert kept >= 40
    result(*command, str(tmp_path / "cut.json"))
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "whole.json"]


def test_kill_in_the_middle_of_evaluate(tmp_path: Path, tiny_archive: Path, many: Path) -> None:
    command = ["evaluate", str(tiny_archive), "--data", str(many), "--quiet"]
    command += ["--batch-seconds", "1.5", "--out"]
    result(*command, str(tmp_path / "whole"))
    journal = tmp_path / "cut" / "hyp.journal"
    kill_when([sys.executable, "-m", "mpq", *command, str(tmp_path / "cut")], lambda: lines_of(journal) > 10)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    result(*command, str(tmp_path / "cut"))
    for name in ("hyp.trn", "ref.trn"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, cut = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "cut"))
    timing = {"rtf", "compute_seconds"}
    assert {k: v for k, v in whole.items() if k not in timing} == {k: v for k, v in cut.items() if k not in timing}
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "hyp.trn",
        "keys.json",
        "metrics.json",
        "ref.trn",
    ]


def test_kill_in_the_middle_of_pack(tmp_path: Path, deeper_archive: Path) -> None:
    """Killed when the file is written but does not have its name yet, which is made to last."""
    command = ["pack", str(deeper_archive), "--bits", "4", "--out"]
    result(*command, str(tmp_path / "whole.safetensors"))
    out, partial = tmp_path / "cut.safetensors", tmp_path / "cut.safetensors.partial"
    slow = "import os, time; from mpq.cli.main import main; os.replace = lambda *_: time.sleep(600); main({})"
    kill_when([sys.executable, "-c", slow.format([*command, str(out)])], partial.exists)
    assert not out.exists()
    result(*command, str(out))
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]
