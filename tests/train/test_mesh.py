"""A step, an evaluation and a restart on meshes of 8 simulated devices, against one device."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from switchmoe.train import load_params
from tests.devices import run_on_devices
from tests.train.worlds import flags

# Compiling is nearly all that these tests cost, and what is compiled need not be fast.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
CHILD = Path(__file__).with_name("mesh_child.py")
SENTENCES = Path(__file__).with_name("mesh_sentences.py")
STEPS = Path(__file__).with_name("mesh_steps.py")


@pytest.mark.timeout(300)
def test_a_step_and_an_evaluation_are_those_of_one_device():
    said = run_on_devices(8, STEPS, timeout=280, environment=QUICK).splitlines()
    assert [line.split(":")[0] for line in said] == ["adafactor", "adafactor", "adamw", "spans"], said


def test_what_does_not_fit_the_mesh_is_one_sentence_before_anything_is_written(tmp_path):
    said = run_on_devices(8, SENTENCES, environment={"WORK": str(tmp_path)})
    assert said.split() == ["refused"] * 10
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_goes_on_on_another_mesh(tmp_path):
    """The restored state is the saved one bit for bit, and the next loss what it would have been."""
    command = [*flags(tmp_path), "--out", str(tmp_path / "out")]
    sizes = {
        "model.moe.num-experts": 8,
        "train.batch-size": 8,
        "train.log-every": 1,
        "train.checkpoint-every": 2,
    }
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    start(tmp_path, command, mesh=dict(data=2, expert=4), kill_at=7)
    (folder,) = tmp_path.glob("out/tiny-*/0")
    rows = {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    newest = max(steps)
    assert newest in (4, 6)  # that of step 6 may or may not have been complete

    start(tmp_path, command, mesh=dict(data=8, expert=1), kill_at=newest + 2)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    saved = [note for note in notes if note["what"] == "saved" and note["step"] == newest]
    (loaded,) = [note for note in notes if note["what"] == "loaded"]
    assert loaded["step"] == newest and len(loaded["state"]) > 30
    assert saved[0]["state"] == loaded["state"]
    assert (saved[0]["experts"], loaded["experts"]) == (2, 8)  # that a device has
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == list(range(1, newest + 2))
    assert again[-1]["loss"] == pytest.approx(rows[newest + 1]["loss"], abs=1e-5)
    # The checkpoint of the mesh is read on the one device that this process has.
    for path, weight in jax.tree.leaves_with_path(load_params(folder)[0]):
        if path[-1].key != "bias_E":
            digest = hashlib.sha256(np.asarray(weight).tobytes()).hexdigest()
            assert loaded["state"][".params" + jax.tree_util.keystr(path)] == digest
    assert json.loads((folder / "env.json").read_text())["mesh"] == dict(data=8, fsdp=1, expert=1, tensor=1)


def start(tmp_path: Path, command: list[str], *, mesh: dict[str, int], kill_at: int) -> None:
    sizes = [word for name, size in mesh.items() for word in (f"--mesh.{name}", str(size))]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", **QUICK}
    env.pop("XLA_FLAGS", None)
    whole = [sys.executable, str(CHILD), str(tmp_path / "notes"), str(kill_at), *command, *sizes]
    ended = subprocess.run(whole, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    described = " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)
    assert f"mesh {described} on 8 devices\n" in ended.stdout
