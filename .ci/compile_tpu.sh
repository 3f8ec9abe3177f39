#!/usr/bin/env bash
# Whether the dropless layer is dense on a TPU, and what the layer sends between eight, by the word of TPU's own
# compiler; no TPU is needed. Installs libtpu into an environment of its own.
#
#   .ci/compile_tpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(.ci/venv.sh "${1:-python3}" .venv-tpu tpu)
# libtpu says on stderr that it finds no TPU; an error of ours ends in Python's traceback, which stays.
JAX_PLATFORMS=cpu "$venv/bin/python" benchmarks/compile_grouped.py --platform tpu
JAX_PLATFORMS=cpu "$venv/bin/python" benchmarks/compile_parallel.py
