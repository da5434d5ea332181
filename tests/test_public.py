"""The public names: there, resolved only when they are used, and visible to type checkers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "mpq": ("load_model",),
    "mpq.quantization": ("QuantSpec", "quantize", "dequantize", "fake_quantize"),
    "mpq.scoring": ("mapsswe",),
    "mpq.allocation": ("allocate", "pareto_frontier"),
}


@pytest.mark.parametrize("package", PUBLIC)
def test_names_are_there_and_type_checkers_see_the_same(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    for name in PUBLIC[package]:
        assert getattr(module, name).__name__ == name
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for block in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"{getattr(module, name).__module__}.{name}" for name in PUBLIC[package]}


def test_a_name_that_is_not_public_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"module 'mpq\.allocation' has no attribute 'budget'"):
        importlib.import_module("mpq.allocation").budget  # noqa: B018


def test_packages_import_nothing_heavy() -> None:
    code = (
        f"import sys, {', '.join(PUBLIC)}\nassert not {{'torch', 'numpy', 'scipy'}} & set(sys.modules), 'slow import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
