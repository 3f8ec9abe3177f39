"""Run a test's body in several processes that are one job, on this machine and with a time limit."""

import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# INDEX and COUNT are there for the body, and LAUNCH with limits that suit a test. Only what Python prints
# reaches `Ended.out`: gloo's own lines, written from threads of its own, would cut into those of the body.
_PREAMBLE = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
from switchmoe.parallel import processes
INDEX, COUNT = {index}, {count}
LAUNCH = processes.LaunchConfig(
    coordinator="127.0.0.1:{port}", num_processes=COUNT, process_id=INDEX,
    connect_seconds={seconds}, lost_seconds={seconds}, shutdown_seconds={seconds},
)
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: the signal), what it wrote, and after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


class Hung(AssertionError):
    """A command that did not end within its time limit, and was killed."""


def once_more(test: Callable[..., None]) -> Callable[..., None]:
    """Gives a test that is Hung a second try, in another folder."""

    @functools.wraps(test)
    def wrapper(*, tmp_path: Path, **fixtures):
        for attempt in ("first", "second"):
            folder = tmp_path / attempt
            folder.mkdir()
            try:
                return test(tmp_path=folder, **fixtures)
            except Hung as hung:
                if attempt == "second":
                    raise
                print(f"trying once more: {hung}")

    return wrapper


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_processes(
    body: str,
    *,
    count: int = 2,
    started: Sequence[int] | None = None,
    devices: int | Sequence[int] = 2,
    seconds: int = 20,
    timeout: float = 90.0,
) -> list[Ended]:
    """Runs Python code in `count` processes of `devices` CPU devices each and returns how each ended.

    Only the processes named in `started` are started. A job that hangs is killed and tried once more, since
    with few cores one in some twenty hangs after it is done; then it is a Hung.
    """
    for attempt in range(2):
        port = free_port()
        environment = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
        commands, environments = [], []
        for index in range(count) if started is None else started:
            own = devices if isinstance(devices, int) else devices[index]
            code = _PREAMBLE.format(index=index, count=count, port=port, seconds=seconds)
            commands.append([sys.executable, "-c", code + textwrap.dedent(body)])
            environments.append(environment | {"JAX_NUM_CPU_DEVICES": str(own)})
        try:
            return run_together(commands, environments, timeout)
        except Hung:
            if attempt:
                raise
    raise AssertionError("unreachable")


def run_together(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], timeout: float
) -> list[Ended]:
    """Runs commands at the same time, in the repository's root; returns how each ended, or raises Hung."""
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), base.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        files = [
            [open(Path(folder) / f"{i}.{name}", "w+", encoding="utf-8") for name in ("out", "err")]
            for i in range(len(commands))
        ]
        start, running = time.monotonic(), []
        try:
            for command, environment, (out, err) in zip(commands, environments, files, strict=True):
                running.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=base | dict(environment),
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                )
            ended: dict[int, float] = {}
            while len(ended) < len(running) and time.monotonic() - start < timeout:
                for index, process in enumerate(running):
                    if index not in ended and process.poll() is not None:
                        ended[index] = time.monotonic() - start
                time.sleep(0.05)
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said = [[_read(file) for file in pair] for pair in files]
        if len(ended) < len(running):
            late = [index for index in range(len(running)) if index not in ended]
            raise Hung(f"after {timeout:g} s commands {late} still ran; all wrote:\n{said}")
        return [
            Ended(process.returncode, out, err, ended[index])
            for index, (process, (out, err)) in enumerate(zip(running, said, strict=True))
        ]


def _read(file) -> str:
    file.seek(0)
    with file:
        return file.read()
