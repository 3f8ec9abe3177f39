"""SLURM for real on this machine: munged, slurmctld and two slurmd, all on loopback, all in one folder."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.runs import Started, wait_for
from tests.processes import free_port

PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")

# Nodes are named by addresses, so that jax, which looks for the first node by its name, needs no /etc/hosts.
# Both slurmd listen at 127.0.0.1. No systemd, no control groups, no accounting.
_CONFIG = """
ClusterName=emulated
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no SLURM on this machine, or None if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd runs as root only"


class Slurm:
    """A cluster that is up; commands find it by SLURM_CONF."""

    def __init__(self, config: Path):
        self.environ = {"SLURM_CONF": str(config)}

    def run(self, *command: str, environ: dict[str, str] | None = None) -> str:
        """Runs a command of SLURM and returns what it printed, without the last newline."""
        env = {**os.environ, **(environ or {}), **self.environ}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        fields = dict(
            part.split("=", 1) for part in self.run("scontrol", "show", "job", job).split() if "=" in part
        )
        return fields[name]

    def jobs(self) -> list[str]:
        """The jobs that are waiting, running or ending."""
        return self.run("squeue", "--noheader", "--format=%A").split()


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Starts SLURM with its state in a folder, and ends all of it with the jobs that are left."""
    (folder / "state").mkdir()
    config, key = folder / "slurm.conf", folder / "munge.key"
    ports: set[int] = set()
    while len(ports) < 3:
        ports.add(free_port())
    config.write_text(_CONFIG.format(folder=folder, ports=sorted(ports)))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    cluster = Slurm(config)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "127.0.0.1"],
        ["slurmd", "-D", "-N", "127.0.0.2"],
    ]
    started: list[Started] = []
    try:
        for index, command in enumerate(daemons):
            started.append(Started(command, cluster.environ, folder / f"{index}-{command[0]}.log"))
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, 20, "munged")
        wait_for(lambda: _idle(cluster) == 2, 60, "two idle nodes")
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            for job in cluster.jobs():
                cluster.run("scancel", "--full", "--signal=KILL", job)
                cluster.run("scancel", job)
            wait_for(lambda: not cluster.jobs(), 30, "the end of all jobs")
        for daemon in reversed(started):
            daemon.process.terminate()
        time.sleep(1)
        for daemon in started:
            daemon.kill()


def _idle(cluster: Slurm) -> int:
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        return cluster.run("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    return 0
