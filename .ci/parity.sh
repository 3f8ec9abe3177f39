#!/usr/bin/env bash
# Our models beside transformers' own, on the CPU: the same logits, the same greedy tokens, and weights that
# transformers loads. torch and transformers go into an environment of their own; switchmoe does not need them.
#
#   .ci/parity.sh [PYTHON] [ARGUMENTS OF PYTEST]
#
# TORCH and TRANSFORMERS choose other releases than those below.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
shift || true
torch=${TORCH:-torch==2.13.0} transformers=${TRANSFORMERS:-transformers>=5.24,<6}

venv=$(.ci/venv.sh "$python" .venv-parity train,hf,test)
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" "$transformers"; then
    echo "switchmoe: $torch and $transformers could not be installed for $python, so nothing was compared" >&2
    exit 1
fi
"$venv/bin/python" -c 'import torch, transformers; print(f"torch {torch.__version__}, transformers {transformers.__version__}")'
exec "$venv/bin/python" -m pytest tests/live "$@"
