"""The repository's own slurm.sbatch under a real SLURM of two emulated nodes."""

import json
from pathlib import Path

import pytest

from tests.cluster.runs import (
    STEPS,
    assert_same_run,
    environment,
    flags,
    folder_of,
    rows,
    saved_steps,
    wait_for,
)
from tests.cluster.slurm_machine import Slurm, slurm, why_not
from tests.processes import once_more

pytestmark = [pytest.mark.timeout(1200), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SCRIPT = "experiments/launch/slurm.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM that all tests here share."""
    with slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(cluster: Slurm, folder: Path, cache: Path, *command: str) -> str:
    """Queues a job that writes to FOLDER/job.log; returns its number."""
    log = ("--parsable", f"--output={folder}/job.log")
    return cluster.run("sbatch", *log, *command, environ=environment(cache))


def wait_until_ended(cluster: Slurm, job: str, folder: Path) -> str:
    """Waits for the end of a job and returns its state."""
    wait_for(lambda: cluster.field(job, "JobState") in ENDED, 300, f"the end of job {job}")
    return cluster.field(job, "JobState") + "\n" + (folder / "job.log").read_text(encoding="utf-8")


@once_more
def test_sigterm_requeue_resume(cluster, cache, undisturbed, tmp_path):
    """After scancel's SIGTERM both tasks save one step; the job, queued again, ends as if undisturbed."""
    out = tmp_path / "runs"
    job = submit(cluster, tmp_path, cache, SCRIPT, *flags(out))
    wait_for(lambda: len(rows(out)) >= 3, 240, "row 3")
    cluster.run("scancel", "--signal=TERM", job)
    wait_for(lambda: cluster.field(job, "Restarts") == "1", 120, "the requeue")
    stopped = saved_steps(out)[-1]
    assert 3 <= stopped < STEPS and len(rows(out)) == stopped
    # SLURM leaves the job alone for two minutes. A few seconds it needs: it took away the first start's
    # credential, and does not tell it from one that is made in the same second.
    wait_for(lambda: cluster.field(job, "JobState") == "PENDING", 60, "a job that waits")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+10seconds")
    assert wait_until_ended(cluster, job, tmp_path).startswith("COMPLETED")
    log = (tmp_path / "job.log").read_text(encoding="utf-8")
    assert f"SIGTERM: saved step {stopped}; the same command goes on from there." in log
    assert json.loads((folder_of(out) / "env.json").read_text())["start_step"] == stopped
    assert_same_run(out, undisturbed)


@once_more
def test_scancel_ends_the_job(cluster, cache, tmp_path):
    """A job that a person cancels saves its state and is not queued again."""
    out = tmp_path / "runs"
    job = submit(cluster, tmp_path, cache, SCRIPT, *flags(out))
    wait_for(lambda: len(rows(out)) >= 3, 240, "row 3")
    cluster.run("scancel", job)
    assert wait_until_ended(cluster, job, tmp_path).startswith("CANCELLED")
    wait_for(lambda: job not in cluster.jobs(), 60, "the end of the job's tasks")
    assert cluster.field(job, "JobState") == "CANCELLED" and cluster.field(job, "Restarts") == "0"
    assert saved_steps(out)[-1] == len(rows(out)) < STEPS


@once_more
def test_batch_script_without_srun(cluster, cache, tmp_path):
    """Two tasks, but the script runs one process without srun: a sentence, and exit code 2."""
    python = environment(cache)["PYTHON"]
    command = " ".join([python, "experiments/pretrain.py", *flags(tmp_path / "runs")])
    job = submit(cluster, tmp_path, cache, "--nodes=2", "--ntasks=2", "--wrap", command)
    ended = wait_until_ended(cluster, job, tmp_path)
    assert ended.startswith("FAILED") and cluster.field(job, "ExitCode") == "2:0", ended
    assert (
        "error: this SLURM job has 2 tasks, but this process was not started by srun and is alone;" in ended
    )
    assert not (tmp_path / "runs").exists()
