"""Train a language model on text, sparse or dense, on one device or many, in one process or several.

Question: none of its own; it is the tool that the other experiments use.
Command:  python experiments/pretrain.py PRESET [--flags], for instance
              python experiments/pretrain.py tiny --train.steps 100 --model.moe.num-experts 16 --out runs
              python experiments/pretrain.py tiny --mesh.data 2 --mesh.expert 4
          PRESET is tiny, small or base, with an encoder tiny-switch, small-switch or switch-base-8, or one of
          these with -dense, its dense twin at equal FLOPs per token.
          --help lists presets, PRESET --help the flags. JAX_NUM_CPU_DEVICES=8 in front simulates devices.
          On a cluster srun, mpirun and the like start several processes (experiments/launch/); by hand it is
          --launch.coordinator HOST:PORT --launch.num-processes N --launch.process-id I for each.
Cost:     tiny takes about a minute on two CPU cores, small some minutes and base hours on a GPU.
Result:   OUT/NAME-HASH/SEED with config.json, env.json, metrics.jsonl, checkpoints/STEP and done.json. The
          hash covers model, data, optimizer and train settings, but not the seed, the cadence of logs,
          evaluations and checkpoints, the place of caches, the mesh or the launch. The same command goes on
          with a run that was stopped or killed, and so does one with another mesh or number of processes.
          Several processes share OUT.

Exit codes: 0 when the run is done, or (unless --launch.stopped-code gives another) was stopped by SIGTERM or
SIGINT after its state was saved; 2 for input that has to be changed, or processes that do not fit together; 3
when losses or gradients were not finite for too many steps in a row; 4 when another process was lost.
"""

import sys

from switchmoe.parallel.processes import ClusterError, cluster_errors, initialize
from switchmoe.train import RunError, run_training
from switchmoe.train.command_line import fail, parse


def main(arguments: list[str]) -> int:
    """Train what the command line says; returns the exit code."""
    try:
        line = parse(arguments, "pretrain.py")
        initialize(line.launch)  # before anything touches a device
        with cluster_errors():
            result = run_training(
                line.config, line.out, line.mesh, tensorboard=line.tensorboard, wandb=line.wandb
            )
    except (RunError, ClusterError) as error:
        return fail(error)
    return line.launch.stopped_code if result.status == "stopped" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
