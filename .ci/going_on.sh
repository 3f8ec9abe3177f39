#!/usr/bin/env bash
# The quickstart at a tiny size, and everything that goes on from its two models: upcycle, fine-tune, distil, generate.
#
#   .ci/going_on.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(.ci/venv.sh "${1:-python3}" auto train,report,hf)/bin/python
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
short=(--train.steps 3 --train.eval-batches 1 --out "$out")

"$python" experiments/quickstart.py --steps 3 --out "$out"
"$python" experiments/upcycle.py --from "$out"/dense-*/0 --experts 4 "${short[@]}"
"$python" experiments/finetune.py --from "$out"/switch-*/0 --tune.part rest --model.moe.expert-dropout 0.4 "${short[@]}"
"$python" experiments/distill.py --from "$out"/switch-????????/0 "${short[@]}"
"$python" experiments/generate.py "$out"/switch-finetune-*/0 --prompt "And it came to pass" --max-new-tokens 20
test "$(ls "$out"/*/0/done.json | wc -l)" -eq 5
