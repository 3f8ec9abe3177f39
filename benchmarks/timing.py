"""Time programs against each other in one process: interleaved rounds, and the least of them."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# A measurement lasts at least this long, so that a short program is called several times in one.
LEAST_SECONDS = {"cpu": 0.02, "device": 0.1}
CLOCKS = {
    "cpu": "process CPU time of a call, all threads of the process added up",
    "device": "elapsed time of a call when calls are queued back to back and waited for at the end",
}


class Program(NamedTuple):
    """A program ready to run: `call()` starts it, `temporary_bytes` is XLA's scratch memory, if known."""

    call: Callable[[], Any]
    temporary_bytes: int | None


def clock_kind() -> str:
    """Name the clock that suits the platform: "cpu" or "device"."""
    return "cpu" if jax.default_backend() == "cpu" else "device"


def prepare(fn: Callable[..., Any], args: tuple) -> Program:
    """Compile a jitted function and read its temporary memory; take any other function as it is."""
    if not hasattr(fn, "lower"):
        return Program(lambda: fn(*args), None)
    compiled = fn.lower(*args).compile()  # pyright: ignore[reportFunctionMemberAccess]
    memory = compiled.memory_analysis()
    return Program(lambda: compiled(*args), None if memory is None else memory.temp_size_in_bytes)


def time_together(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each program once a round, `rounds` times, and return the seconds a call took in each round.

    Every second round goes backwards, so that no program always follows the same one. The first call of each
    is not counted; the second says how many calls make a measurement long enough.

    On a CPU the clock is the process's CPU time, which other processes disturb less than elapsed time, and
    each call is waited for. It counts the work of all threads, and page faults where memory is taken anew. On
    an accelerator calls are queued without waiting, so that while the device is the bottleneck, elapsed time
    over calls is the device's time.
    """
    kind, names = clock_kind(), list(calls)
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, math.ceil(LEAST_SECONDS[kind] / max(_seconds(call, 1, kind), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in names[::-1] if turn % 2 else names:
            seconds[name].append(_seconds(calls[name], repeats[name], kind))
    return seconds


def _seconds(call: Callable[[], Any], repeats: int, kind: str) -> float:
    now = time.process_time if kind == "cpu" else time.perf_counter
    start = now()
    for _ in range(repeats):
        result = call()
        if kind == "cpu":
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (now() - start) / repeats
