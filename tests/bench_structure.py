"""How a Python package is built, in numbers: files, lines, the longest of each, and the imports between its parts.

    python tests/bench_structure.py [FOLDER ...]

FOLDER is the folder of a package (default: mpq); several are printed one after the other, so that two versions of a
checkout can be compared. An arrow is a pair of parts (sub-packages, or modules at the top) of which one imports the
other anywhere in it; a floor is one level of the longest chain of arrows.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (lines, name) of every function and method, inner ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def imported(tree: ast.Module, package: str) -> set[str]:
    """Returns the parts of the package that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def describe(folder: Path) -> None:
    """Prints the numbers of one package."""
    files = {path: path.read_text() for path in sorted(folder.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in files.items()}
    parts = {path.relative_to(folder).parts[0].removesuffix(".py") for path in files}
    arrows: dict[str, set[str]] = {part: set() for part in parts}
    for path, tree in trees.items():
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        arrows[own] |= (imported(tree, folder.name) & parts) - {own}

    @cache
    def floor(part: str) -> int:
        return 1 + max((floor(other) for other in arrows[part]), default=0)

    lines = {path: len(text.splitlines()) for path, text in files.items()}
    longest = max(lines, key=lambda path: lines[path])
    size, name = max(found for tree in trees.values() for found in functions(tree))
    long = sum(count > 60 for tree in trees.values() for count, _ in functions(tree))
    print(f"{folder}: {len(files)} files, {sum(lines.values())} lines, {len(parts)} parts at the top")
    print(f"  longest file {lines[longest]} lines ({longest.relative_to(folder)})")
    print(f"  longest function {size} lines ({name}); {long} functions of more than 60 lines")
    try:
        floors = max(map(floor, parts))
    except RecursionError:
        floors = "endless, there is a circle"
    print(f"  {sum(map(len, arrows.values()))} arrows between the parts; floors: {floors}")


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["mpq"]:
        describe(Path(argument))
