"""Train a language model on text, sparse or dense.

Question: none of its own; it is the tool that the other experiments use.
Command:  python experiments/pretrain.py PRESET [--flags], for instance
              python experiments/pretrain.py tiny --train.steps 100 --model.moe.num-experts 16 --out runs
          PRESET is tiny, small or base, or one of these with -dense, its dense twin at equal FLOPs per token.
          --help lists presets, PRESET --help the flags.
Cost:     tiny takes about a minute on two CPU cores, small some minutes and base hours on a GPU.
Result:   OUT/NAME-HASH/SEED with config.json, env.json, metrics.jsonl, checkpoints/STEP and done.json. The
          hash covers model, data, optimizer and train settings, but not the seed, the cadence of logs,
          evaluations and checkpoints, or the place of caches. The same command goes on with a run that was
          stopped or killed.

Exit codes: 0 when the run is done, or was stopped by SIGTERM or SIGINT after its state was saved; 2 for input
that has to be changed; 3 when losses or gradients were not finite for too many steps in a row.
"""

import sys

from switchmoe.train import RunError, run_training
from switchmoe.train.command_line import fail, parse


def main(arguments: list[str]) -> int:
    """Train what the command line says; returns the exit code."""
    try:
        line = parse(arguments, "pretrain.py")
        run_training(line.config, line.out, tensorboard=line.tensorboard, wandb=line.wandb)
    except RunError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
