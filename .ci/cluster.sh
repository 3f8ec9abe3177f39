#!/usr/bin/env bash
# Several processes for real: two of them by hand, SLURM with two emulated nodes, and mpirun; all on loopback.
# As root on Debian or Ubuntu installs what is missing of slurm-wlm, munge and openmpi-bin, and starts no
# service.
#
#   .ci/cluster.sh [PYTHON] [ARGUMENTS OF PYTEST]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
shift || true

install() { # The packages, with a rule in place that keeps their services from starting.
    local rule=/usr/sbin/policy-rc.d
    if [ ! -e "$rule" ]; then
        trap 'rm -f '"$rule" EXIT
        printf '#!/bin/sh\nexit 101\n' >"$rule"
        chmod +x "$rule"
    fi
    export DEBIAN_FRONTEND=noninteractive
    local get=(apt-get --quiet=2 --yes --no-install-recommends)
    "${get[@]}" install "$@" >/dev/null || { "${get[@]}" update && "${get[@]}" install "$@" >/dev/null; }
}

packages=()
for pair in slurmctld:slurm-wlm munged:munge mpirun:openmpi-bin; do
    command -v "${pair%:*}" >/dev/null || packages+=("${pair#*:}")
done
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (install "${packages[@]}") || echo "could not install ${packages[*]}; their tests are skipped" >&2
    else
        echo "not root, or no apt-get: the tests that need ${packages[*]} are skipped" >&2
    fi
fi

venv=$(.ci/venv.sh "$python" auto train,report,tensorboard,test)
exec "$venv/bin/python" -m pytest tests/cluster "$@"
