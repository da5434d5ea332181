#!/usr/bin/env bash
# From a machine with only Python to a compressed model: makes .venv, installs mpq, runs the whole chain.
#   recipes/demo/run.sh MODEL.nemo DATA_FOLDER [OUT]     (DATA_FOLDER has train.jsonl and dev.jsonl)
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ $# -lt 2 ]; then
    echo "usage: $0 MODEL.nemo DATA_FOLDER [OUT]   (recipes/read_speech/README.md says where to get both)" >&2
    exit 2
fi
[ -x "$here/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$here/.venv"
"$here/.venv/bin/python" -m pip install --quiet --editable "$here"
PATH="$here/.venv/bin:$PATH" "$here/recipes/read_speech/run.sh" "$@"
