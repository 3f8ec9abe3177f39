"""Time a training step of a Switch Transformer against transformers' on the same weights, in one process.

Question: is a step (forward pass, gradient, AdamW) of an encoder-decoder Switch Transformer faster here than
          with transformers and torch, on a CPU?
Command:  python benchmarks/train_step.py [--rounds 5] [--json FILE]; needs torch and transformers beside it.
Cost:     some minutes on two CPU cores, and 8 GB of memory.
Result:   a table of medians, and in FILE the same with each round's times and losses.

The model has switch-base-8's widths (768 features, FFNs of 3,072, 12 heads, 8 experts, 32,128 ids) and two
layers in the encoder and two in the decoder, the second of each sparse. A step takes rows of 512 source and
114 target tokens, T5's proportions, of random ids. transformers' weights are written to a folder and read by
`switchmoe.interop.from_hf`; before anything is timed the losses of both must agree.

Rounds are interleaved: in each, every contender takes a step. Noted are elapsed seconds and the process's CPU
seconds of both; each process gets all cores. Of torch's AdamW both kinds are timed, the default and "fused".
transformers' experts have as many seats as a row has tokens, so that neither side drops one; "switchmoe,
1.25" drops what the published training capacity drops. Ours computes the router's losses and skips a step
that is not finite, which transformers does not.
"""

import copy
import dataclasses
import datetime
import importlib.metadata
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from switchmoe.interop import from_hf
from switchmoe.models import LMConfig, param_count
from switchmoe.train import RunError
from switchmoe.train.command_line import fail
from switchmoe.train.records import environment, prepare_folder, write_json

if __package__:  # imported as benchmarks.train_step
    from benchmarks.train_contenders import Settings, Step, make_batch, make_theirs, our_step, their_step
else:  # beside a script, which finds its neighbours by their own names
    from train_contenders import Settings, Step, make_batch, make_theirs, our_step, their_step

OURS, THEIRS = "switchmoe", "transformers"


def time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Take a step of each contender a round, every second round backwards; each one's first is not timed.

    Returns each one's elapsed seconds, the process's CPU seconds (all threads) and losses.
    """
    names, taken = list(steps), {name: {"seconds": [], "cpu_seconds": [], "losses": []} for name in steps}
    for turn in range(-1, rounds):
        for name in names[::-1] if turn % 2 else names:
            wall, cpu = time.perf_counter(), time.process_time()
            loss = steps[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            taken[name]["losses"].append(loss)
            if turn >= 0:
                taken[name]["seconds"].append(wall)
                taken[name]["cpu_seconds"].append(cpu)
    return taken


def check_losses(taken: dict[str, dict[str, list[float]]], exact: list[str]) -> None:
    """Make sure that all contenders that drop nothing computed one loss from the same weights.

    Raises:
      RunError: they did not, so their times say nothing.
    """
    first = [taken[name]["losses"][0] for name in exact]
    if max(first) - min(first) > 1e-4 * max(first):
        raise RunError(
            f"the contenders do not compute the same loss: {dict(zip(exact, first, strict=True))}."
        )


def run(settings: Settings) -> int:
    """Build both models from one set of weights, time their steps, and show and keep what came out."""
    if settings.layers % 2 or settings.rounds < 1:
        raise RunError(
            f"layers is {settings.layers} and rounds {settings.rounds}; make layers even, rounds 1."
        )
    if settings.json is not None:
        prepare_folder(settings.json.absolute().parent)
    batch = make_batch(settings)
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_theirs(settings, Path(folder))
        read = from_hf(folder)
    config = read.config
    params = nnx.to_pure_dict(nnx.state(read, nnx.Param))
    assert config.moe is not None
    moes = {
        OURS: dataclasses.replace(config.moe, dispatch="dropless", expert_capacity=None),
        f"{OURS}, 1.25": dataclasses.replace(config.moe, expert_capacity=None, capacity_factor=1.25),
    }
    steps = {
        name: our_step(settings, dataclasses.replace(config, moe=moe), params, batch)
        for name, moe in moes.items()
    }
    steps[THEIRS] = their_step(theirs, batch, fused=False)
    steps[f"{THEIRS}, fused"] = their_step(copy.deepcopy(theirs), batch, fused=True)
    taken = time_rounds(steps, settings.rounds)
    check_losses(taken, [OURS, THEIRS, f"{THEIRS}, fused"])
    rows = [
        {
            "name": name,
            "median_seconds": statistics.median(times["seconds"]),
            "median_cpu_seconds": statistics.median(times["cpu_seconds"]),
            **times,
        }
        for name, times in taken.items()
    ]
    show(rows, settings)
    if settings.json is not None:
        write_json(settings.json, describe(settings, config) | {"rows": rows})
    return 0


def show(rows: list[dict[str, Any]], settings: Settings) -> None:
    """Print the medians, and how often transformers' step is as long."""
    table = Table(title=f"A training step of {settings.rows} rows, medians of {settings.rounds} rounds")
    for heading in ("", "seconds", "CPU seconds", f"{THEIRS}' to it", "in CPU seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    theirs = next(row for row in rows if row["name"] == THEIRS)
    for row in rows:
        medians = [row["median_seconds"], row["median_cpu_seconds"]]
        ratios = [theirs["median_seconds"] / medians[0], theirs["median_cpu_seconds"] / medians[1]]
        table.add_row(row["name"], *(f"{value:.2f}" for value in (*medians, *ratios)))
    Console().print(table)


def describe(settings: Settings, config: LMConfig) -> dict[str, Any]:
    """Say what is timed, with what, and where."""
    about = environment()
    for private in ("command", "platform"):  # places on this machine, and its kernel
        about.pop(private)
    about["versions"] |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}
    return {
        "benchmark": "train_step",
        "date": datetime.date.today().isoformat(),
        **about,
        "parameters": param_count(config)[0],
        "settings": asked,
    }


def main() -> int:
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except (RunError, ValueError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))


if __name__ == "__main__":
    sys.exit(main())
