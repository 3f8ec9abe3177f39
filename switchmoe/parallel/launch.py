"""Who started this process: the `--launch.*` settings, and what an engine left in the environment."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, get_args

from switchmoe.config import check_at_least, check_choice

EXIT_BAD_LAUNCH = 2
BY_HAND = "give --launch.coordinator HOST:PORT, --launch.num-processes and --launch.process-id"

Distributed = Literal["auto", "on", "off"]


class ClusterError(RuntimeError):
    """Several processes that can't start or go on together: one sentence, and `code`, the exit code.

    `together` says that every process raises the same error at the same place, so they can leave together.
    """

    def __init__(self, sentence: str, *, together: bool = False):
        super().__init__(sentence)
        self.code = EXIT_BAD_LAUNCH
        self.together = together


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How processes find each other and how long they wait; no part of what a run computes.

    Attributes:
      distributed: "auto" joins a cluster where the environment shows one: a SLURM step or an MPI job of more
        than one process, several TPU hosts of GKE, or a coordinator. "on" also lets jax look for what the
        environment does not show for certain (a TPU slice on Compute Engine, an indexed Kubernetes job), and
        fails if there is nothing. "off" never joins.
      coordinator: HOST:PORT of process 0, where no engine tells it; JAX_COORDINATOR_ADDRESS says the same.
      num_processes: how many processes there are, where no engine tells it.
      process_id: which of them this is, from 0, where no engine tells it.
      connect_seconds: how long to wait until all processes have come together.
      lost_seconds: how long a process may be silent until the others take it for lost.
      shutdown_seconds: how long a process that is done waits for the others to be done.
      stopped_code: the exit code of a run that a signal stopped after its state was saved. An engine that
        starts a failed job again, but not one that is done, needs another one than 0: 75 means "try again".
    """

    distributed: Distributed = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    connect_seconds: int = 300
    lost_seconds: int = 100
    shutdown_seconds: int = 300
    stopped_code: int = 0

    def __post_init__(self) -> None:
        check_choice("launch.distributed", self.distributed, get_args(Distributed))
        for name in ("connect_seconds", "lost_seconds", "shutdown_seconds"):
            check_at_least(f"launch.{name}", getattr(self, name), 1)
        if not 0 <= self.stopped_code <= 255:
            raise ValueError(f"launch.stopped_code is {self.stopped_code}, but exit codes are 0 to 255.")
        if self.coordinator is not None:
            address(self.coordinator)
        count, index = self.num_processes, self.process_id
        if count is not None:
            check_at_least("launch.num_processes", count, 1)
        if index is not None:
            check_at_least("launch.process_id", index, 0)
            if count is not None and index >= count:
                raise ValueError(
                    f"launch.process_id is {index}, but launch.num_processes is {count}; the last one is "
                    f"process {count - 1}."
                )


def address(coordinator: str) -> tuple[str, int]:
    """Split HOST:PORT, also with an IPv6 host in brackets.

    Raises:
      ValueError: it has another form.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"launch.coordinator must be HOST:PORT, such as node1:1234, not {coordinator!r}.")
    return host.strip("[]"), int(port)


def find_cluster(launch: LaunchConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Decide from the settings and the environment what to ask `jax.distributed.initialize` for.

    Returns:
      The keywords that name the cluster, none of them where jax finds out by itself; None for one process.

    Raises:
      ClusterError: there should be several processes, but this one was started so that it can't find them.
    """
    if launch.distributed == "off":
        return None
    coordinator = launch.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator or launch.num_processes is not None or launch.process_id is not None:
        return _by_hand(launch, coordinator, environ)
    # Before SLURM: mpirun inside a SLURM job starts the processes, and the job's variables are there too.
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        # jax reads what Open MPI 4 says; Open MPI 5 no longer says where its first process runs.
        return {} if "OMPI_MCA_orte_hnp_uri" in environ else _over_mpi4py("Open MPI 5 or newer")
    if "SLURM_JOB_ID" in environ and _number(environ, "SLURM_NTASKS") > 1:
        _check_srun(environ)
        return {}
    if _number(environ, "PMI_SIZE") > 1:
        return _over_mpi4py("this MPI")
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or _number(environ, "MEGASCALE_NUM_SLICES") > 1:
        return {}
    return {} if launch.distributed == "on" else None


def _by_hand(
    launch: LaunchConfig, coordinator: str | None, environ: Mapping[str, str]
) -> dict[str, Any] | None:
    if launch.num_processes == 1:
        return None
    parts = dict(coordinator=coordinator, num_processes=launch.num_processes, process_id=launch.process_id)
    missing = [f"--launch.{name.replace('_', '-')}" for name, value in parts.items() if value is None]
    if missing or coordinator is None:
        raise ClusterError(f"processes that are started by hand need {' and '.join(missing)} too.")
    try:
        address(coordinator)
    except ValueError as error:
        raise ClusterError(str(error)) from error
    found = {"coordinator_address": parts.pop("coordinator"), **parts}
    if not {"SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri"} & environ.keys():
        # Those two also tell jax which GPU of a machine is whose; elsewhere there is nothing to look for.
        found["cluster_detection_method"] = "deactivate"
    return found


def _check_srun(environ: Mapping[str, str]) -> None:
    tasks = environ["SLURM_NTASKS"]
    # The step of a batch script, or of salloc's shell, holds one process whatever the job asked for.
    if "SLURM_STEP_NODELIST" not in environ or environ.get("SLURM_STEP_NUM_TASKS", tasks) != tasks:
        raise ClusterError(
            f"this SLURM job has {tasks} tasks, but this process was not started by srun and is alone; write "
            "srun before the command, or add --launch.distributed off for one process."
        )


def _over_mpi4py(who: str) -> dict[str, Any]:
    if importlib.util.find_spec("mpi4py") is None:
        raise ClusterError(f"under {who} processes find each other by mpi4py; install it, or {BY_HAND}.")
    return {"cluster_detection_method": "mpi4py"}


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0
