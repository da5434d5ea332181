#!/usr/bin/env bash
# Sets up .venv with all that the tests need, then runs the linter, the type checker and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[dev]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"  # a process for each core
