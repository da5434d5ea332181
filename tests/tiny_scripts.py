"""Scripts of the recipes as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def script(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Returns the module that recipes/RECIPE/NAME.py is."""
    spec = importlib.util.spec_from_file_location(f"{recipe}_{name}", RECIPES / recipe / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
