"""Public names of a package that are imported when they are first used, so that `import mpq` costs nothing.

A package imports the same names under TYPE_CHECKING, for editors and type checkers, which cannot see the lazy ones.
"""

import importlib
from collections.abc import Callable
from typing import Any


def names(package: str, **modules: str) -> Callable[[str], Any]:
    """Returns a package's `__getattr__` (PEP 562).

    Args:
        package: The package's `__name__`.
        modules: {public name: the module of the package that defines it}.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get
