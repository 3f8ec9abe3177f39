#!/usr/bin/env bash
# One run over Open MPI, from the repository's root:
#
#   HOSTS=node1:8,node2:8 experiments/launch/mpirun.sh base --mesh.expert 16
#
# HOSTS names the machines and the processes on each (one a GPU, one a machine on CPUs); without it two
# processes run here. The arguments are for experiments/pretrain.py; PYTHON=... chooses the interpreter. All
# machines must see the same code, texts and runs folder. Other settings of mpirun go into variables, for
# instance OMPI_MCA_oob_tcp_if_include=eth0.
#
# SIGTERM to this script saves the current step in all processes; the same command goes on from there.
set -uo pipefail
python=${PYTHON:-python}

# jax finds Open MPI 4 by itself. Version 5 does not say where its first process is, so mpi4py has to.
version=$(mpirun --version | sed -n '1s/.* \([0-9]*\)\..*/\1/p')
if [ "${version:-0}" -ge 5 ] && ! "$python" -c 'import mpi4py' 2>/dev/null; then
    echo "error: under Open MPI $version install mpi4py into the environment of $python." >&2
    exit 2
fi

# mpirun shows its processes a terminal, where the run would draw a bar; through cat it writes lines.
mpirun --host "${HOSTS:-localhost:2}" --bind-to none \
    bash -c 'exec "$@" > >(trap "" USR1; cat)' bash "$python" experiments/pretrain.py "$@" &
job=$!
# mpirun would kill on SIGTERM, but it passes SIGUSR1 on, which means the same to the run.
trap 'kill -USR1 "$job"' TERM
# A signal ends `wait` too, so wait until mpirun itself is gone.
while kill -0 "$job" 2>/dev/null; do wait "$job"; done
wait "$job"
