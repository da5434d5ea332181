#!/usr/bin/env bash
# The whole chain on a published model and real speech: recipes/read_speech/run.sh MODEL.nemo DATA_FOLDER [OUT]
set -euo pipefail
model=${1:?usage: run.sh MODEL.nemo DATA_FOLDER [OUT]} data=${2:?usage: run.sh MODEL.nemo DATA_FOLDER [OUT]} out=${3:-runs/read_speech}
mkdir -p "$out"
mpq evaluate "$model" --data "$data/dev.jsonl" --out "$out/fp32"
mpq sensitivity "$model" --data "$data/train.jsonl" --bits 2,3,4,5,6,8 --out "$out/sens.json"
mpq allocate "$out/sens.json" --target-mb "${TARGET_MB:-6.5}" --out "$out/alloc.json"
mpq pack "$model" --allocation "$out/alloc.json" --out "$out/small.safetensors"
mpq evaluate "$out/small.safetensors" --data "$data/dev.jsonl" --out "$out/small"
mpq compare "$out/fp32" "$out/small" --out "$out/comparison.json"
