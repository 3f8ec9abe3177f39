"""The training of a run from its beginning, or from where it was, to a clean end, however that comes."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from switchmoe.models import LMConfig
from switchmoe.parallel import MeshConfig
from switchmoe.parallel.processes import is_main
from switchmoe.train.checkpoint import Checkpoints
from switchmoe.train.config import TrainConfig, run_folder
from switchmoe.train.display import DisplayMode, number
from switchmoe.train.given import Given, Teacher, check_given, with_given
from switchmoe.train.model import Params
from switchmoe.train.preemption import StopRequest
from switchmoe.train.recorder import Recorder, Row
from switchmoe.train.records import prepare_folder
from switchmoe.train.running import Run, RunResult
from switchmoe.train.start import agree_on_run, check_checkpoints, find_done, prepare, together

__all__ = ["RunResult", "run_training"]


def run_training(
    config: TrainConfig,
    out: str | Path = "runs",
    mesh: MeshConfig | None = None,
    *,
    start: Params | None = None,
    teacher: Teacher | tuple[Params, LMConfig] | None = None,
    display: DisplayMode = "auto",
    on_row: Callable[[Row], None] | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
) -> RunResult:
    """Train a run to its end, from its newest checkpoint if it has one; a finished run is only reported.

    Everything is left in OUT/NAME-HASH/SEED: config.json, env.json (of the last start), metrics.jsonl,
    checkpoints/STEP, done.json. Killed at any moment and called again with the same configuration, it ends
    with the same weights, bit for bit on a CPU and the same mesh, and the same rows, timings apart. SIGTERM
    and SIGINT save the current step and return with status "stopped".

    A run may be given weights to start from, instead of drawing them, and a teacher. Their fingerprints are
    in its configuration (`tune.weights`, `tune.teacher`), and so in its name: the same ones go on with it,
    others make another run. `tune.part` says which of the weights move. FLOPs are counted as if all did, and
    without the teacher's.

    Several processes (see `parallel.processes.initialize`) all call this with the same arguments and the same
    folder, which they share. Process 0 alone writes and shows; all return the same, timings apart.

    Args:
      config: what to train.
      out: the folder that holds the folders of runs.
      mesh: how the run is split over devices, all of them unless said; a run may go on on another mesh.
      start: the weights to start from, a tree as `load_params` or `pure_model(...).init` give it; nothing is
        done to its arrays.
      teacher: weights and shape of a model to learn from beside the text (`tune.soft_share`).
      display: "auto" is a progress bar on a terminal and lines elsewhere; "quiet" shows warnings only.
      on_row: called, in process 0, with every row of metrics after it is written.
      tensorboard: write event files into the run's folder too (needs tensorboardX).
      wandb: send the rows to Weights & Biases too (needs wandb).

    Raises:
      RunError: one sentence and an exit code: 2, before anything is compiled, for a corpus, folder, mesh,
        checkpoint or given weights that don't fit; 3 when `train.max_bad_steps` steps in a row had a loss or
        gradient that isn't finite.
      ClusterError: the same of several processes, for what one of them finds wrong, or they differ in.
    """
    given = Given(start, None if teacher is None else Teacher(*teacher))
    with together():
        config = with_given(config, given)
    folder = run_folder(config, out)
    done = find_done(config, folder)
    if done is not None:
        if display != "quiet" and is_main():
            loss = number(done["val_loss"])
            print(f"{folder} is already done: validation loss {loss} after {done['steps']} steps.")
        return RunResult(folder, "already done", done["steps"], done)
    mesh = mesh or MeshConfig()
    with StopRequest() as stop:
        with together():
            corpus, layout = prepare(config, folder, mesh, tensorboard=tensorboard, wandb=wandb)
            check_given(config, given, layout)
            run = Run(config, folder, corpus, layout, stop, given)
        agree_on_run(config, mesh, corpus)
        with together():
            prepare_folder(folder)
        recorder = functools.partial(
            Recorder, config, folder, display=display, on_row=on_row, tensorboard=tensorboard, wandb=wandb
        )
        with Checkpoints(folder, config, corpus.fingerprint) as checkpoints:
            check_checkpoints(checkpoints)
            result = run.go(checkpoints, recorder)
    return dataclasses.replace(result, stop_requested=stop.requested is not None)
