#!/usr/bin/env bash
# What only a GPU can show, in fifteen minutes and without network: benchmarks/gpu.sh OUTPUT.json
# PYTHON names the interpreter of an environment in which noisepolicy and its test extras are installed.
set -euo pipefail
python=$(command -v "${PYTHON:-python}")
output=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
cd "$(mktemp -d)"  # where Python finds the installed package, not the sources
exec "$python" -m noisepolicy.benchmarks.gpu "$output" --tests "$root/tests" "${@:2}"
