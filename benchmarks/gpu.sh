#!/usr/bin/env bash
# What only a GPU can show, in fifteen minutes and without network: benchmarks/gpu.sh OUTPUT.json
# PYTHON names the interpreter of an environment in which noisepolicy and its test extras are installed.
set -euo pipefail
exec "${PYTHON:-python}" -m noisepolicy.benchmarks.gpu "$@"
