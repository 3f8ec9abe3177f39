"""The repository's own mpirun.sh under Debian's Open MPI."""

import json
import os
import shutil
import signal

import pytest

from tests.cluster.runs import (
    STEPS,
    Started,
    assert_same_run,
    environment,
    flags,
    folder_of,
    rows,
    saved_steps,
    wait_for,
)
from tests.processes import once_more

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin"),
]

# Open MPI talks over every network of the machine unless it is told; and it asks root twice.
LOOPBACK = {
    "OMPI_MCA_oob_tcp_if_include": "lo",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@once_more
def test_sigterm_and_the_same_command(cache, undisturbed, tmp_path):
    """SIGTERM makes both processes save one step; the same command then ends as an undisturbed run does."""
    out = tmp_path / "runs"
    command = ["experiments/launch/mpirun.sh", *flags(out)]

    started = Started(command, environment(cache) | LOOPBACK, tmp_path / "first.log")
    try:
        wait_for(lambda: len(rows(out)) >= 3, 240, "row 3")
        os.kill(started.process.pid, signal.SIGTERM)
        assert started.wait(120) == 0, started.wrote()
    finally:
        started.kill()
    stopped = saved_steps(out)[-1]
    assert 3 <= stopped < STEPS and len(rows(out)) == stopped
    assert f"SIGTERM: saved step {stopped}; the same command goes on from there." in started.wrote()

    started = Started(command, environment(cache) | LOOPBACK, tmp_path / "second.log")
    try:
        assert started.wait(300) == 0, started.wrote()
    finally:
        started.kill()
    assert json.loads((folder_of(out) / "env.json").read_text())["start_step"] == stopped
    assert_same_run(out, undisturbed)
