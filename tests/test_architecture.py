"""Imports point one way, help starts without torch, nothing unsafe is used, and every module has its test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mpq"
ORDER = (
    "cli", "pipeline", "export", "search", "finetuning", "allocation", "training", "sensitivity", "scoring", "loading",
    "artifact", "models", "speech", "identity", "config", "quantization", "coding",
)  # fmt: skip
"""The packages and two modules, the highest first; below them are the other modules at the top of mpq."""
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def height(name: str) -> int:
    """Returns how many packages lie below this one; 0 for a module at the top of mpq."""
    return len(ORDER) - ORDER.index(name) if name in ORDER else 0


def imports(path: Path) -> set[str]:
    """Returns the names of the packages of mpq, and modules at its top, that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("mpq.") and name != "mpq.__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports(path) - {own}:
        if path.name != "__main__.py":
            assert height(other) < height(own) or height(other) == 0 == height(own), f"{own} imports {other}"


def test_no_module_has_a_name_that_says_nothing_or_two_ideas() -> None:
    for path in MODULES:
        assert path.stem not in ("utils", "common", "helpers", "core", "misc")
        assert len(path.read_text().splitlines()) <= 400, path


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["allocate", "--help"], ["compare", "--help"]])
def test_help_starts_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mpq.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'scipy', 'rich'} & set(sys.modules), 'slow import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compare_and_allocate_run_without_torch() -> None:
    code = "import sys, mpq.scoring.compare, mpq.allocation.solve, mpq.cli.tables\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_command_line_prints() -> None:
    """The library logs: who uses it from Python decides what becomes of messages."""
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] != "cli":
            for node in ast.walk(ast.parse(path.read_text())):
                said = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
                assert said not in ("print", "sys.stderr", "sys.stdout", "click.echo"), f"{path}:{node.lineno}: {said}"


def test_no_private_parts_of_libraries_are_used() -> None:
    """A name with a leading underscore is taken from mpq's own objects alone."""
    for path in MODULES:
        tree = ast.parse(path.read_text())
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpq"))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mpq"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if is_private(name)], f"{path}:{node.lineno}: {names}"
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                base = ast.unparse(node.value).split(".")[0]
                assert base not in imported or ast.unparse(node) == "os._exit", (
                    f"{path}:{node.lineno}: {ast.unparse(node)}"
                )


UNTESTED = {
    "errors.py": "a class without a body; tests/cli/test_main.py shows what becomes of it at the border",
    "__main__.py": "one call; every test that starts `python -m mpq` runs it",
}
"""The modules without a test of their own, and why."""
TESTS = Path(__file__).resolve().parent


def test_every_module_has_its_test() -> None:
    names = {str(path.relative_to(PACKAGE)): path.relative_to(PACKAGE) for path in MODULES}
    lacking = {name for name, path in names.items() if not (TESTS / path.parent / f"test_{path.name}").exists()}
    assert lacking == set(UNTESTED)


def test_files_of_tests_are_short_and_import_no_other_test() -> None:
    """What they share is in tiny_*.py and knapsacks.py, and in the fixtures of conftest.py."""
    own = {path.stem for path in TESTS.rglob("*.py")}
    shared = {path.stem for path in TESTS.glob("tiny_*.py")} | {"knapsacks"}
    for path in TESTS.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & (own - shared | {"tests", ""}), f"{path}:{node.lineno}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
