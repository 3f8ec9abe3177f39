"""Who started a process, by the settings and the environment; and the settings themselves."""

import pytest

from switchmoe.parallel.launch import ClusterError, LaunchConfig, address, find_cluster

SLURM_STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_STEP_NUM_TASKS": "2",
}
SLURM_BATCH = {name: value for name, value in SLURM_STEP.items() if "STEP" not in name}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911"}
TPUS = {"TPU_WORKER_HOSTNAMES": "w0,w1", "TPU_WORKER_ID": "1"}
ONE_TPU = {"TPU_WORKER_HOSTNAMES": "w0", "TPU_WORKER_ID": "0"}
# An indexed job can be one process in several pods, or as many single ones as it has pods.
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
BY_HAND = LaunchConfig(coordinator="n1:1234", num_processes=2, process_id=1)


@pytest.mark.parametrize(
    "environ",
    [{}, SLURM_STEP | {"SLURM_NTASKS": "1"}, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ONE_TPU, KUBERNETES],
)
def test_environments_of_one_process(environ):
    """A job of one process is no cluster; "on" looks all the same, "off" never does."""
    assert find_cluster(LaunchConfig(), environ) is None
    assert find_cluster(LaunchConfig("on"), environ) == {}
    assert find_cluster(LaunchConfig("off"), environ) is None


@pytest.mark.parametrize(
    "environ", [SLURM_STEP, OPEN_MPI | OPEN_MPI_4, OPEN_MPI | OPEN_MPI_4 | SLURM_BATCH, TPUS]
)
def test_environments_of_several_processes(environ):
    """jax finds the others by itself there, so nothing is passed to it, unless a coordinator is given."""
    assert find_cluster(LaunchConfig(), environ) == {}
    assert find_cluster(LaunchConfig("off"), environ) is None
    found = find_cluster(BY_HAND, environ)
    assert found is not None
    # Under SLURM and Open MPI jax still looks which GPU a process has.
    assert found.pop("cluster_detection_method", None) == ("deactivate" if environ == TPUS else None)
    assert found == {"coordinator_address": "n1:1234", "num_processes": 2, "process_id": 1}


def test_a_coordinator_from_the_environment():
    """JAX_COORDINATOR_ADDRESS stands for the flag."""
    environ = {"JAX_COORDINATOR_ADDRESS": "n1:1234"}
    found = find_cluster(LaunchConfig(num_processes=2, process_id=0), environ)
    assert found is not None and found["coordinator_address"] == "n1:1234"
    with pytest.raises(ClusterError, match="need --launch.num-processes and --launch.process-id too"):
        find_cluster(LaunchConfig(), environ)


@pytest.mark.parametrize(
    "environ, sentence",
    [
        (
            SLURM_BATCH,
            "has 2 tasks, but this process was not started by srun and is alone; write srun before",
        ),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"}, "was not started by srun"),
        (
            OPEN_MPI,
            "under Open MPI 5 or newer processes find each other by mpi4py; install it, or give --launch",
        ),
        ({"PMI_SIZE": "4"}, "under this MPI processes find each other by mpi4py"),
        ({"JAX_COORDINATOR_ADDRESS": "n1:1234"}, "need --launch.num-processes and --launch.process-id too"),
    ],
)
def test_processes_that_can_not_find_each_other(environ, sentence, monkeypatch):
    """A batch script without its launcher, and the like, are told what to write."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=sentence):
        find_cluster(LaunchConfig(), environ)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"distributed": "yes"}, "launch.distributed='yes' is not known"),
        ({"coordinator": "n1"}, "launch.coordinator must be HOST:PORT"),
        ({"coordinator": "n1:99999"}, "launch.coordinator must be HOST:PORT"),
        ({"num_processes": 0}, "launch.num_processes is 0, but must be at least 1"),
        ({"process_id": -1}, "launch.process_id is -1, but must be at least 0"),
        ({"num_processes": 2, "process_id": 2}, "launch.process_id is 2, but launch.num_processes is 2"),
        ({"connect_seconds": 0}, "launch.connect_seconds is 0"),
        ({"lost_seconds": 0}, "launch.lost_seconds is 0"),
        ({"shutdown_seconds": 0}, "launch.shutdown_seconds is 0"),
        ({"stopped_code": 256}, "launch.stopped_code is 256, but exit codes are 0 to 255"),
    ],
)
def test_settings_that_can_not_be(settings, sentence):
    """The settings check themselves."""
    with pytest.raises(ValueError, match=sentence):
        LaunchConfig(**settings)


def test_addresses():
    """HOST:PORT, with the brackets of IPv6 taken off."""
    assert address("n1:1234") == ("n1", 1234)
    assert address("[::1]:80") == ("::1", 80)
