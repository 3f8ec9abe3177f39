"""Time greedy generation against transformers' on the same weights, in one process.

Question: are reading a prompt and generating, token by token, at least as fast here as with transformers and
          torch, and 1.5 times as fast with experts of 8 bits?
Command:  python benchmarks/decode.py [--rounds 5] [--json FILE]; needs torch and transformers beside it.
Cost:     about 4 minutes on two CPU cores, and 4 GB of memory.
Result:   a table of medians, and in FILE the same with each round's times.

The model is a small Mixtral with random weights: 8 layers of 512 features, 8 heads that share 4 of keys and
values, 8 experts of 1,536 hidden features of which a token takes 2, and 8,192 ids: 166M parameters, 52M of
them active. transformers' weights are written to a folder and read by `switchmoe.interop.from_hf`; before
anything is timed, the scores of both must agree, and the rounds say how many generated tokens do.

Three tasks: "batch 1" and "batch 8" read prompts of 32 tokens and generate 64 more a row, and count those;
"prefill" reads one prompt of 512, chooses a token, and counts the 512. A call is `generate` of either side,
from ids on the host to ids on the host. Rounds are interleaved: in each, every contender does every task, and
every second round goes backwards. Noted are elapsed seconds and the process's CPU seconds; ratios are of each
round's elapsed seconds, transformers' over ours, and their median. Ours is prepared (`infer.prepare`), which
is not timed. On a GPU the contenders are float32 and bfloat16 of both; XLA_PYTHON_CLIENT_PREALLOCATE=false
leaves torch some of its memory.
"""

import dataclasses
import datetime
import importlib.metadata
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from switchmoe.models import LMConfig, param_count
from switchmoe.train import RunError
from switchmoe.train.command_line import fail
from switchmoe.train.records import environment, prepare_folder, write_json

if __package__:  # imported as benchmarks.decode
    from benchmarks import show
    from benchmarks.decode_sides import THEIRS, Generate, Settings, Tasks, make_contenders
else:  # beside a script, which finds its neighbours by their own names
    import show
    from decode_sides import THEIRS, Generate, Settings, Tasks, make_contenders

Taken = dict[tuple[str, str], dict[str, Any]]
COLUMNS = (
    ("name", "implementation", "{}"),
    ("task", "task", "{}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("ratio", "to transformers", "{:.2f}"),
    ("cpu_ratio", "in CPU time", "{:.2f}"),
    ("same_tokens", "same tokens", "{:.0%}"),
)


def time_round(contenders: dict[str, Generate], tasks: Tasks, taken: Taken, turn: int) -> None:
    """Let each contender do each task, backwards every second time, and note what it took.

    `taken` holds by contender and task the elapsed seconds, the process's CPU seconds, and the tokens.
    """
    jobs = [(name, task) for task in tasks for name in contenders]
    for name, task in jobs[::-1] if turn % 2 else jobs:
        ids_BS, new_tokens, _ = tasks[task]
        wall, cpu = time.perf_counter(), time.process_time()
        tokens_BN = contenders[name](ids_BS, new_tokens)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        mine = taken.setdefault((name, task), {"seconds": [], "cpu_seconds": []})
        mine["seconds"].append(wall)
        mine["cpu_seconds"].append(cpu)
        mine["tokens"] = tokens_BN


def make_rows(taken: Taken, tasks: Tasks) -> list[dict[str, Any]]:
    """Compare each contender with transformers in its type, round by round."""
    rows = []
    for (name, task), mine in taken.items():
        reference = taken[f"{THEIRS} {name.split()[1]}", task]

        def ratio(clock, mine=mine, reference=reference):
            return statistics.median(a / b for a, b in zip(reference[clock], mine[clock], strict=True))

        row = {
            "name": name,
            "task": task,
            "tokens_per_second": tasks[task][2] / statistics.median(mine["seconds"]),
            "ratio": ratio("seconds"),
            "cpu_ratio": ratio("cpu_seconds"),
            "same_tokens": float(np.mean(mine["tokens"] == reference["tokens"])),
        }
        rows.append(row | {clock: mine[clock] for clock in ("seconds", "cpu_seconds")})
    return rows


def run(settings: Settings) -> int:
    """Time both sides, show what came out, and keep the file up to date after each round."""
    if settings.rounds < 1 or settings.new_tokens < 1:
        raise RunError("rounds and new_tokens must be at least 1.")
    if settings.json is not None:
        prepare_folder(settings.json.absolute().parent)
    # Products of float32 are exact on both sides: XLA would round what goes into them on a GPU, torch not.
    jax.config.update("jax_default_matmul_precision", "highest")
    device, tasks = ("cpu" if jax.default_backend() == "cpu" else "cuda"), settings.tasks()
    contenders, config = make_contenders(settings, device)
    time_round(contenders, tasks, {}, 0)  # compiles
    taken: Taken = {}
    for turn in range(settings.rounds):
        time_round(contenders, tasks, taken, turn)
        rows = make_rows(taken, tasks)
        if settings.json is not None:
            write_json(settings.json, describe(settings, config) | {"rows": rows})
    show.show("Greedy generation", rows, Console(), COLUMNS)
    return 0


def describe(settings: Settings, config: LMConfig) -> dict[str, Any]:
    """Say what was timed, with what, and where."""
    about = environment()
    for private in ("command", "platform"):  # places on this machine, and its kernel
        about.pop(private)
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}
    total, active = param_count(config)
    return {
        "benchmark": "decode",
        "date": datetime.date.today().isoformat(),
        "settings": asked,
        "parameters": total,
        "active_parameters": active,
        "clock": "elapsed seconds of a call, and CPU seconds of the process, all threads added up",
        "peers": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "environment": about,
    }


def main() -> int:
    """Read the command line, time, and explain an expected failure in one line."""
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except (RunError, ValueError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))


if __name__ == "__main__":
    sys.exit(main())
