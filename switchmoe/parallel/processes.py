"""Several processes as one job, over jax.distributed: joining, agreeing, stopping and failing together.

With one process everything here is harmless: nothing is joined, everybody agrees, nobody is lost.
"""

import os
import signal
import socket
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from switchmoe.parallel.agreement import agree, gather_errors
from switchmoe.parallel.launch import (
    BY_HAND,
    EXIT_BAD_LAUNCH,
    ClusterError,
    LaunchConfig,
    address,
    find_cluster,
)
from switchmoe.parallel.lost_peers import EXIT_LOST, cluster_errors, explain_abort, leave

__all__ = [
    "EXIT_LOST",
    "ClusterError",
    "LaunchConfig",
    "agree",
    "cluster_errors",
    "gather_errors",
    "initialize",
    "is_main",
    "process_count",
    "stop_requested",
]


def initialize(launch: LaunchConfig | None = None) -> bool:
    """Join the other processes of this job, if there are any; call it before anything touches a device.

    jax.distributed is started only where a cluster is there or asked for: see `LaunchConfig.distributed`.
    From then on SIGTERM to one process is heard by all (see `stop_requested`), SIGUSR1 means the same, and a
    lost process ends the others within `lost_seconds`, with a sentence and EXIT_LOST, also where jax itself
    would abort.

    If the processes don't come together within `connect_seconds`, a process that can't reach its coordinator
    raises; one that is inside jax's call, which can't be left in another way, says its sentence and ends with
    exit code 2.

    Returns:
      Whether this process now is one of several.

    Raises:
      ClusterError: one sentence, for a launch that can't work: see `find_cluster`; no cluster although one is
        asked for; a device was used already; the coordinator doesn't answer, or its port is taken.
    """
    launch = LaunchConfig() if launch is None else launch
    if jax.distributed.is_initialized():
        return process_count() > 1
    cluster = find_cluster(launch, os.environ)
    if cluster is None:
        return False
    who = "this process"
    if "process_id" in cluster:
        who = f"process {cluster['process_id']} of {cluster['num_processes']}"
        if cluster["process_id"] > 0:
            _wait_for(cluster["coordinator_address"], launch.connect_seconds, who)
        else:
            _check_port(cluster["coordinator_address"])
    _connect(launch, cluster, who)
    try:
        several = process_count() > 1
    except RuntimeError as error:
        # Not raised: jax would wait for the others when this process ends.
        leave(f"{who} joined the others, but jax can't start its devices: {error}", EXIT_BAD_LAUNCH)
    if not several:
        explain_abort(None)
        return False
    explain_abort(
        f"process {jax.process_index()} of {process_count()} stops since another process was lost (the lines "
        "above may say which); see what that one wrote, and start the same command again to go on from the "
        "last checkpoint."
    )
    if os.name == "posix" and threading.current_thread() is threading.main_thread():
        # mpirun passes SIGUSR1 on to its processes, while SIGTERM makes it kill them.
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return True


def process_count() -> int:
    """How many processes there are; it starts jax's devices, so `initialize` comes first."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this is process 0, the one that writes files and the screen."""
    return jax.process_index() == 0


def stop_requested(step: int) -> bool:
    """Whether all processes stop after this step, since one of them or all got SIGTERM.

    Every process must call it after every step, with the same numbers: the processes settle on a step that
    none of them has passed. With one process it is always False: there is nothing to settle.
    """
    return process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def _connect(launch: LaunchConfig, cluster: dict[str, Any], who: str) -> None:
    limit = launch.connect_seconds
    late = (
        f"{who} and the others did not come together within {limit} s; check that all of them were started, "
        "with the same coordinator and number of processes, and that they reach its port, or raise "
        "--launch.connect-seconds."
    )
    # jax aborts the process when its own limit is over, so ours comes first.
    explain_abort(late)
    timer = threading.Timer(limit, leave, [late, EXIT_BAD_LAUNCH])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **cluster,
            initialization_timeout=limit + 30,
            heartbeat_timeout_seconds=launch.lost_seconds,
            shutdown_timeout_seconds=launch.shutdown_seconds,
        )
    except Exception as error:
        explain_abort(None)
        raise ClusterError(_why(error)) from error
    finally:
        timer.cancel()


def _why(error: Exception) -> str:
    text = str(error)
    if "must be called before" in text:
        return "processes must be joined before jax is used; call parallel.initialize() first in the program."
    if "should be defined" in text or "must be defined" in text:
        return (
            "there is no cluster here that jax knows; start the program with srun, mpirun or another "
            f"launcher, or {BY_HAND}."
        )
    return f"the processes could not be joined: {' '.join(text.split()) or type(error).__name__}"


def _check_port(coordinator: str) -> None:
    """See whether process 0 can have its port; jax 0.10 to 0.12 may crash without a word where it can't."""
    port = address(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator))[1]
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
    except OSError as error:
        raise ClusterError(
            f"process 0 can't listen at port {port} for the others ({error}); choose another one in "
            "--launch.coordinator."
        ) from error


def _wait_for(coordinator: str, seconds: int, who: str) -> None:
    """Wait until something listens at the coordinator's address."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address(coordinator), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > end:
                raise ClusterError(
                    f"{who} got no answer from the coordinator {coordinator} within {seconds} s ({error}); "
                    "check that process 0 runs there and that its port is reachable, or raise "
                    "--launch.connect-seconds."
                ) from error
            time.sleep(0.5)
