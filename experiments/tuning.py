"""What finetune.py, distill.py and upcycle.py share: weights and settings to go on from, and the run."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from switchmoe.config import MoEConfig
from switchmoe.data import DataConfig
from switchmoe.interop import WeightsError, read_config
from switchmoe.models import LMConfig
from switchmoe.parallel.processes import ClusterError, cluster_errors, initialize
from switchmoe.train import (
    OptimizerConfig,
    RunError,
    Teacher,
    TrainConfig,
    TrainSettings,
    TuneConfig,
    run_training,
)
from switchmoe.train.command_line import CommandLine, fail, read_flags, read_known
from switchmoe.train.config import from_json
from switchmoe.train.errors import bad_input
from switchmoe.transfer import Params, params_of

if __package__:  # imported as experiments.tuning
    from experiments import weights
else:  # imported by a script, which finds its neighbours by their own names
    import weights

Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
# The flag --from, which as a name is a word of Python's.
From = Annotated[Path, tyro.conf.arg(name="from", metavar="FOLDER")]
# For weights that come without the run that made them.
GENTLE = OptimizerConfig(learning_rate=1e-4, warmup_steps=20)


class Job(NamedTuple):
    """What a command has to train, once its processes have found each other.

    Attributes:
      config: the run's settings, before the flags change them.
      weights: `(config) -> (start, teacher)`, given the settings that the flags made of it.
    """

    config: TrainConfig
    weights: Callable[[TrainConfig], tuple[Params | None, Teacher | None]]


def main(
    arguments: Sequence[str],
    program: str,
    about: str,
    flags: Any,  # a dataclass; what is made of it goes to the functions
    plan: Callable[[Any], Job],
    finish: Callable[[Any, TrainConfig, Params | None], bool] = lambda *_: False,
) -> int:
    """Read the command's own flags and then those of a run, and train it; returns the exit code.

    `plan` sees the former and reads no weights yet. `finish` sees the weights to start from, and may say that
    all is done with these.
    """
    arguments = list(arguments)
    wants_help = [word for word in arguments if word in ("-h", "--help")]
    known = any(word.split("=")[0] == "--from" for word in arguments)
    try:
        if wants_help:
            print(about)
            if not known:
                print(f"{program} --from FOLDER --help shows the flags of the run too, with their values.\n")
            try:
                read_known(flags, ["--help"], program)
            except SystemExit:
                if not known:
                    raise
        own, rest = read_known(flags, [word for word in arguments if word not in wants_help], program)
        with bad_input():
            job = plan(own)
        also = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(own)]
        line = read_flags([*rest, *wants_help], program, CommandLine(job.config), also)
        initialize(line.launch)  # before anything touches a device
        with cluster_errors():
            with bad_input():
                start, teacher = job.weights(line.config)
                if finish(own, line.config, start):
                    return 0
            result = run_training(
                line.config,
                line.out,
                line.mesh,
                start=start,
                teacher=teacher,
                tensorboard=line.tensorboard,
                wandb=line.wandb,
            )
    except (RunError, ClusterError) as error:
        return fail(error)
    return line.launch.stopped_code if result.status == "stopped" else 0


def read_settings(folder: Path) -> tuple[LMConfig, TrainConfig | None]:
    """Read what a folder's weights are of, and the settings of the run that made them if it is a run's.

    Raises:
      ValueError, RunError: one sentence, if there are no weights that are known.
    """
    folder = folder.expanduser()
    kind = weights.tell_kind(folder)
    if kind == "hf":
        return read_config(folder), None
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        if kind == "run":
            config = from_json(saved)
            return config.model, config
        model = saved["model"]
        return LMConfig(**(model | {"moe": model["moe"] and MoEConfig(**model["moe"])})), None
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{folder / 'config.json'} is no configuration of a model: {error}.") from error


def settings_after(folder: Path, suffix: str, *, share_of_rate: float = 1.0) -> TrainConfig:
    """Settings for a run that goes on from a folder's weights: those of the run that made them, if one did.

    Of that run's learning rate it is a share. Weights are trained in float32, whatever they are kept in. Text
    for weights without a run goes through the tokenizer.json beside them, if there is one.
    """
    model, run = read_settings(folder)
    model = dataclasses.replace(model, param_dtype="float32", scan_layers=True)
    if run is None:
        name = folder.expanduser().resolve().name.lstrip(".") or "weights"
        data = DataConfig(
            tokenizer=str(folder) if (folder.expanduser() / "tokenizer.json").is_file() else "bytes",
            objective="span_corruption" if model.encoder_layers else "next_token",
        )
        return TrainConfig(f"{name}-{suffix}", model, data, GENTLE, TrainSettings())
    rate = share_of_rate * run.optimizer.learning_rate
    optimizer = dataclasses.replace(run.optimizer, learning_rate=rate)
    return dataclasses.replace(
        run, name=f"{run.name}-{suffix}", model=model, optimizer=optimizer, tune=TuneConfig()
    )


def read_weights(folder: Path) -> tuple[Params, LMConfig]:
    """Read a folder's weights as a tree, and what they are of."""
    model = weights.read_model(folder)
    return params_of(model), model.config
