"""Imports point one way, the command line starts without torch, and nothing unsafe is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mpq"
LAYERS = [
    {"errors"},
    {"files", "validation", "config"},
    {"options", "search_space"},
    {"contradictions"},
    {"records", "scores", "journal", "audio", "recipes", "run_record", "mu_law", "figures"},
    {"pareto", "significance", "packing", "grids", "features", "text", "decoding", "runtime", "pitch", "optimization"},
    {"metrics", "gptq"},
    {"quantizers"},
    {"storage"},
    {"manifests", "decisions", "general_quantizer"},
    {"models", "augment"},
    {"artifact", "data", "divergence", "allocation", "losses", "orthogonal", "low_rank", "importance"},
    {"calibration", "fisher", "training_data", "training_record", "fake_quant"},
    {"supernet", "held_out", "training_log", "training_folder", "assignment", "distillation"},
    {"training_loop", "finetune_record", "learning_curve", "search_record"},
    {"objectives", "architecture_figure"},
    {"finetune_loop", "weight_loop", "search_loop"},
    {"sensitivity", "refine", "evaluate", "compare", "pack", "inspection", "training", "finetune", "search"},
    {"stages"},
    {"pipeline"},
    {"report"},
    {"quantize_commands", "recipe_commands"},
    {"cli"},
    {"__main__"},
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def level(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def imports(path: Path) -> set[str]:
    """Returns the first names of the mpq modules that are imported when this one is (not inside its functions)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mpq."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "mpq":
            found |= {alias.name for alias in node.names} - {"__version__"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports(path) - {own}:
        assert level(other) < level(own), f"{own} imports {other}"


def test_no_module_has_a_name_that_says_nothing_or_two_ideas() -> None:
    for path in MODULES:
        assert path.stem not in ("utils", "common", "helpers", "core", "misc")
        assert len(path.read_text().splitlines()) <= 420, path


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
        "import sys\nfrom mpq.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'scipy', 'rich'} & set(sys.modules), 'slow import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compare_and_allocate_run_without_torch() -> None:
    code = "import sys, mpq.compare, mpq.allocation, mpq.report\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
