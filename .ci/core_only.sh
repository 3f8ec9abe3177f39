#!/usr/bin/env bash
# The functional core must stand on its own: installs the package without extras into an empty environment, away
# from this tree, and calls the layer once there. Also looks whether the built package carries its data files.
#
#   .ci/core_only.sh [PYTHON]
set -euo pipefail

python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A copy, since pip builds inside the folder it is given and would leave build/ in the tree.
mkdir "$work/source"
cp -R "$root"/{setup.cfg,pyproject.toml,README.md,LICENSE,switchmoe} "$work/source"
"$python" -m venv "$work/venv"
PIP_DISABLE_PIP_VERSION_CHECK=1 "$work/venv/bin/python" -m pip install --quiet "$work/source"

cd "$work" # Away from the tree, so that the import finds what was installed.
JAX_PLATFORMS=cpu PYTHONPATH='' SOURCE="$work/source/switchmoe" "$work/venv/bin/python" -I - <<'PYTHON'
import importlib.util
import os
import sys
from pathlib import Path

trainers = ("flax", "optax", "orbax", "grain", "tyro", "rich", "matplotlib", "jinja2")
installed = [name for name in trainers if importlib.util.find_spec(name)]
assert not installed, f"installing switchmoe without extras also installed {installed}"

import jax
import switchmoe as sm

package = Path(sm.__file__).parent
assert "site-packages" in str(package), f"imported from {package}, not from the installed package"
config = sm.MoEConfig(d_model=16, d_ff=32, num_experts=4)
params = sm.init_moe(jax.random.key(0), config)
x = jax.random.normal(jax.random.key(1), (2, 64, 16))
y, aux = sm.moe(params, x, config)
assert y.shape == x.shape and bool(abs(y).sum() > 0), y
assert float(aux.tokens) == 128, aux.tokens
imported = [name for name in trainers if name in sys.modules]
assert not imported, f"import switchmoe and one moe call imported {imported}"

source = Path(os.environ["SOURCE"])
files = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
lost = sorted(str(path) for path in files if not (package / path).is_file())
assert not lost, f"files of the package that were not installed; see options.package_data in setup.cfg: {lost}"
print(f"core only: {len(files)} files installed, one moe call, no trainer needed")
PYTHON
