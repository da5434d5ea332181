"""What a command does where its output goes nowhere good; in processes of their own, as a shell starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def compare(tmp_path: Path) -> list[str]:
    """A command whose output has characters of many scripts."""
    (tmp_path / "ref.trn").write_text("caf\u00e9 \u4f60\u597d (x-1)\n", encoding="utf-8")
    (tmp_path / "hyp.trn").write_text("caf\u00e9 \u4f60 (x-1)\n", encoding="utf-8")
    ref, hyp = (str(tmp_path / name) for name in ("ref.trn", "hyp.trn"))
    return ["compare", "--ref", ref, "--a", hyp, "--b", ref]


def shell(arguments: list[str], redirect: str, **environment: str) -> tuple[int, str, str]:
    """Returns the exit status, stdout and stderr of a command with redirections, as a shell runs it."""
    command = [sys.executable, "-m", "mpq", *arguments]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *command],
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "caf? ??"), pytest.param("latin-1", None, marks=pytest.mark.slow)]
)
def test_characters_that_the_encoding_lacks_are_replaced(compare: list[str], encoding: str, shown: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpq", *compare],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        check=True,
    )
    assert (shown or "caf\u00e9 ??") in done.stdout.decode(encoding)
    code, stdout, _ = shell([*compare, "--json"], "", PYTHONIOENCODING=encoding)
    assert code == 0 and "\\u4f60" in stdout  # JSON says all of it in any encoding


@pytest.mark.parametrize("is_unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_full_stdout_is_one_line(compare: list[str], is_unbuffered: str) -> None:
    for arguments in (compare, [*compare, "--json"], ["--help"], ["compare", "--help"]):
        code, stdout, stderr = shell(arguments, ">/dev/full", PYTHONUNBUFFERED=is_unbuffered)
        assert (code, stdout) == (2, "")
        assert stderr == "mpq: stdout: cannot be written: No space left on device; what was printed is not whole\n"


def test_a_closed_stdout_is_one_line_before_the_work(compare: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, _, stderr = shell([*compare, "--out", str(out)], ">&-")
    assert (code, stderr) == (2, "mpq: stdout is closed; send it to a file, or to /dev/null\n")
    assert not out.exists()


def test_a_pipe_that_nobody_reads_is_one_line(compare: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mpq", *compare], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == "mpq: stdout: cannot be written: Broken pipe; what was printed is not whole\n"


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_without_stderr_the_work_is_done(compare: list[str], redirect: str) -> None:
    code, stdout, _ = shell(compare, redirect)
    assert code == 0 and "MAPSSWE" in stdout
    assert shell(["inspect", "nothing"], redirect)[0] == 2
