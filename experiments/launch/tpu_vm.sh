#!/usr/bin/env bash
# One run on a Cloud TPU slice of several hosts, from your own machine:
#
#   TPU=my-slice ZONE=us-central2-b experiments/launch/tpu_vm.sh base --mesh.expert 16 --out /mnt/runs
#
# The arguments are for experiments/pretrain.py. Before the first run, on all hosts: copy the repository to
# FOLDER (switchmoe in the home folder unless given), install it into FOLDER/.venv with the extras train and
# tpu, and mount a file system that all hosts share (Filestore, say) for --out. For instance, to install:
#
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
#       --command='cd switchmoe && python3 -m venv .venv && .venv/bin/pip install -e .[train,tpu]'
#
# To save the current step on all hosts and stop, tell one of them; the same command goes on from there:
#
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 \
#       --command='pkill -f experiments/pretrain.py'
set -euo pipefail

# Outside GKE nothing in the environment says that a TPU VM is one of several, so jax is told to look.
printf -v command '%q ' .venv/bin/python experiments/pretrain.py "$@" --launch.distributed on
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd ${FOLDER:-switchmoe} && $command"
