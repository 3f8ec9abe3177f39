"""Several processes over gloo: how they join, agree, stop together, and end when one is lost."""

import pytest

from switchmoe.parallel import processes
from switchmoe.parallel.launch import ClusterError, LaunchConfig
from tests.processes import run_processes

# A step that no process can finish alone.
_STEP = """
import os, signal, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
def step():
    x = jax.make_array_from_callback((jax.device_count(),), NamedSharding(mesh, P("x")), lambda i: np.ones(1))
    return float(total(x))
"""
_AFTER_JOINING = """
assert processes.initialize(LAUNCH) and processes.initialize(LAUNCH)
assert processes.process_count() == COUNT and processes.is_main() == (INDEX == 0)
mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
total = jax.jit(jax.numpy.sum)
"""


def test_agreement_and_a_lost_peer():
    """Equal values pass, others are named everywhere; one killed in a collective ends the other process."""
    first, second = run_processes(
        _STEP
        + _AFTER_JOINING
        + """
with processes.cluster_errors():
    processes.agree("config", "x" * 5000)
    processes.gather_errors(None)
    for what, value in (("checkpoint step", str(INDEX)), ("config", "x" * 5000 + str(INDEX))):
        try:
            processes.agree(what, value)
        except processes.ClusterError as error:
            print(error)
    try:
        processes.gather_errors(["no text file", None][1 - INDEX])
    except processes.ClusterError as error:
        print(error)
    assert step() == 4 and step() == 4
    if INDEX == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        step()
""",
        seconds=5,
    )
    assert second.code == -9
    for said in (first.out, second.out):
        lines = said.splitlines()
        assert lines[0].startswith(
            "process 1 of 2 has another checkpoint step ('1') than process 0 ('0'); start"
        )
        assert lines[1].startswith("process 1 of 2 has another config (SHA-256 ")
        assert lines[2] == "process 1 of 2: no text file"
    assert first.code == 4, first
    assert first.seconds < 60
    assert _sentence(first.err).startswith("process 0 of 2 stops since another process was lost (")


def test_losing_process_0_while_nothing_is_computed():
    """The coordinator's death reaches a process that is busy with something else, without any collective."""
    first, second = run_processes(
        _STEP
        + _AFTER_JOINING
        + """
with processes.cluster_errors():
    step()
    if INDEX == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    print("slept")
"""
    )
    assert first.code == -9 and second.code == 4 and "slept" not in second.out
    assert _sentence(second.err).startswith("process 1 of 2 stops since another process was lost (")


def test_sigterm_to_one_process_stops_all_at_the_same_step():
    """The step is one that none has passed; then all leave, each with exit code 0."""
    ended = run_processes(
        _STEP
        + _AFTER_JOINING
        + """
with processes.cluster_errors():
    for number in range(1, 2000):
        step()
        if number == 5 and INDEX == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if processes.stop_requested(number):
            print("stopped at", number)
            break
"""
    )
    assert [process.code for process in ended] == [0, 0], ended
    stops = [process.out.split("stopped at ")[1].split()[0] for process in ended]
    assert stops[0] == stops[1] and 5 <= int(stops[0]) < 1999


def test_an_error_of_one_process_ends_all():
    """An unexpected exception is a traceback and a sentence; the other process is not left waiting."""
    first, second = run_processes(
        _STEP
        + _AFTER_JOINING
        + """
with processes.cluster_errors():
    step()
    if INDEX == 1:
        raise KeyError("weights")
    while True:
        step()
""",
        seconds=5,
    )
    assert second.code == 1 and "Traceback" in second.err
    assert _sentence(second.err) == "process 1 of 2 failed (KeyError: 'weights') and ends the whole job."
    assert first.code == 4 and "another process was lost" in _sentence(first.err)


def test_processes_with_different_numbers_of_devices():
    """Every process says so and leaves with exit code 2, as with any disagreement."""
    ended = run_processes(
        """
with processes.cluster_errors():
    processes.initialize(LAUNCH)
    processes.agree("config", "same")
""",
        devices=(2, 1),
    )
    for process in ended:
        assert process.code == 2, process
        assert _sentence(process.err) == (
            "process 1 of 2 has 1 devices and process 0 has 2; every process needs the same number."
        )


@pytest.mark.parametrize("index", [0, 1])
def test_the_others_do_not_come(index):
    """Process 1 without a coordinator, and process 0 without process 1, say so within the limit."""
    (ended,) = run_processes(
        """
try:
    processes.initialize(LAUNCH)
except processes.ClusterError as error:
    raise SystemExit(f"error: {error}")
""",
        started=[index],
        seconds=3,
        timeout=40,
    )
    assert ended.code == (2, 1)[index], ended
    want = (
        "and the others did not come together within 3 s"
        if index == 0
        else "got no answer from the coordinator"
    )
    assert _sentence(ended.err).startswith(f"process {index} of 2 {want}")
    assert "Check failure stack trace" not in ended.err


def test_a_server_that_is_no_coordinator():
    """Something that listens and never answers does not hold a process for longer than the limit."""
    (ended,) = run_processes(
        """
import dataclasses, socket
with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    processes.initialize(dataclasses.replace(LAUNCH, coordinator=address))
""",
        started=[1],
        seconds=3,
        timeout=40,
    )
    assert ended.code == 2 and ended.seconds < 30, ended
    assert _sentence(ended.err).startswith("process 1 of 2 and the others did not come together within 3 s")


def test_launches_that_can_not_work():
    """No cluster where one is asked for, a port that is taken, a device used too early: one sentence each."""
    (ended,) = run_processes(
        """
import dataclasses, os, socket
import jax
def why(launch):
    try:
        processes.initialize(launch)
    except processes.ClusterError as error:
        print(error)
why(processes.LaunchConfig("on"))
with socket.create_server(("127.0.0.1", int(LAUNCH.coordinator.split(":")[1]))):
    why(LAUNCH)
jax.devices()
why(LAUNCH)
""",
        started=[0],
    )
    assert ended.code == 0, ended
    lines = ended.out.splitlines()
    assert len(lines) == 3, ended
    assert lines[0].startswith(
        "there is no cluster here that jax knows; start the program with srun, mpirun or"
    )
    assert lines[1].startswith("process 0 can't listen at port ")
    assert lines[2].startswith(
        "processes must be joined before jax is used; call parallel.initialize() first"
    )


def test_one_process_joins_nothing():
    """Without a cluster all of it does nothing, and an exception passes through `cluster_errors`."""
    assert not processes.initialize(LaunchConfig("off"))
    assert processes.process_count() == 1 and processes.is_main()
    assert not processes.stop_requested(1)
    processes.agree("config", "anything")
    processes.gather_errors(None)
    with pytest.raises(ClusterError, match="^no text file$"):
        processes.gather_errors("no text file")
    with pytest.raises(KeyError), processes.cluster_errors():
        raise KeyError("weights")


def _sentence(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")
