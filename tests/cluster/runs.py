"""Runs of experiments/pretrain.py for the tests of clusters: their commands, and what they left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switchmoe.train.checkpoint import load_params
from tests.processes import ROOT, Hung, free_port

STEPS = 80  # So many that a signal after row 3 comes before the end on a fast machine too.
TIMINGS = ("seconds", "tokens_per_second", "mfu")
LIMITS = ("--launch.connect-seconds", "20", "--launch.lost-seconds", "20", "--launch.shutdown-seconds", "20")


def flags(out: Path, *, data: int = 2, expert: int = 2, steps: int = STEPS) -> list[str]:
    """The arguments of a small run that writes a row each step and a checkpoint every twentieth."""
    mesh = ["--mesh.data", str(data), "--mesh.expert", str(expert)]
    cadence = ["--train.log-every", "1", "--train.checkpoint-every", "20"]
    return ["tiny", "--train.steps", str(steps), "--out", str(out), *cadence, *mesh, *LIMITS]


def environment(cache: Path, *, devices: int = 2) -> dict[str, str]:
    """Variables for processes of that many CPU devices, whose coordinator listens on this machine alone."""
    port = free_port()
    return {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "SWITCHMOE_CACHE": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }


class Started:
    """A command in the repository's root, with its own process group and a file that it writes to."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path):
        self.log = log
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | dict(environ)
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> int:
        """Waits for the exit code (negative: the signal); Hung if it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Hung(f"{self.log.name} did not end within {seconds:g} s:\n{self.wrote()}") from None

    def wrote(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """Ends the whole process group at once, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def by_hand(
    arguments: Sequence[Sequence[str]], cache: Path, folder: Path, *, devices: int = 2
) -> Iterator[list[Started]]:
    """Starts pretrain.py once for each list of arguments; several are told where the others are."""
    env = environment(cache, devices=devices)
    started: list[Started] = []
    try:
        for index, own in enumerate(arguments):
            command = [sys.executable, "experiments/pretrain.py", *own]
            if len(arguments) > 1:
                command += ["--launch.coordinator", env["JAX_COORDINATOR_BIND_ADDRESS"]]
                command += ["--launch.num-processes", str(len(arguments)), "--launch.process-id", str(index)]
            started.append(Started(command, env, folder / f"process-{index}.log"))
        yield started
    finally:
        for process in started:
            process.kill()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until a condition holds; Hung if it takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Hung(f"{what} did not come within {seconds:g} s")
        time.sleep(0.1)


def folder_of(out: Path) -> Path:
    """The folder of the only run in OUT."""
    (folder,) = out.glob("*/*")
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows that the only run in OUT has so far, without their timings; none if there is no run."""
    files = list(out.glob("*/*/metrics.jsonl"))
    lines = files[0].read_text(encoding="utf-8").split("\n")[:-1] if files else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def saved_steps(out: Path) -> list[int]:
    """The steps of the checkpoints in the only run of OUT."""
    return sorted(
        int(path.name) for path in (folder_of(out) / "checkpoints").iterdir() if path.name.isdigit()
    )


def assert_same_run(out: Path, want: Path) -> None:
    """Both ended with the same rows, timings apart, and the same weights, bit for bit."""
    assert rows(out) == rows(want)
    ours, theirs = load_params(folder_of(out))[0], load_params(folder_of(want))[0]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
