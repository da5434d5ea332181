#!/usr/bin/env bash
# From a machine with only Python to a compressed speech recogniser: makes .venv, installs mpq, speaks a small synthetic
# corpus, trains a Conformer on it, compresses it and tests what that costs. Six to ten minutes on two CPU cores.
#   recipes/demo/run.sh [OUT]        (OUT is runs/demo; a second call goes on where the first one stopped)
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$here/runs/demo}
start=$SECONDS
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -x "$here/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$here/.venv"
"$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$here[demo]"
echo "installed after $((SECONDS - start)) s" >&2
"$here/.venv/bin/python" "$here/recipes/demo/synthesize.py" "$out/data"
"$here/.venv/bin/mpq" run "$here/recipes/demo/demo.toml" --out "$out" --set "data.root=$out/data"
echo "the whole demo took $((SECONDS - start)) s; all results are in $out" >&2
