"""A real process, killed at moments of every kind, ends as one that was never disturbed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from switchmoe.train import read_rows
from switchmoe.train.rows import TIMINGS

from .worlds import flags

CHILD = Path(__file__).with_name("child.py")
KILLED, CLEAN = -signal.SIGKILL, 0

# How each start of the disturbed run ends, and the checkpoints it leaves (steps 5, 10, 15, 20 and the last,
# 24, two are kept). The run killed at step 4 has saved nothing; the one killed in row 9 has saved 5; the
# write of 10 is interrupted twice, so 5 stays the only one. SIGTERM saves the step it came at, 13, which
# makes 5 go. Then 15 is saved and 10 is partly removed: whatever is left of it, 13 and 15 are whole.
STARTS = [
    ("after step 4", KILLED, set()),
    ("in row 9", KILLED, {5}),
    ("in checkpoint 10", KILLED, {5}),
    ("before commit of 10", KILLED, {5}),
    ("SIGTERM at step 13", CLEAN, {10, 13}),
    ("in removal of 10", KILLED, {13, 15}),
    ("before done", KILLED, {20, 24}),
    ("never", CLEAN, {20, 24}),
]
# The starts share what was compiled, to save time, but for one that compiles for itself, as a user's does.
COMPILED_ANEW = "in removal of 10"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_at_every_kind_of_moment_ends_like_one_never_disturbed(tmp_path):
    command = flags(tmp_path)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    code, said = start("never", [*command, "--out", str(undisturbed)], tmp_path)
    assert code == CLEAN, said
    for moment, ending, whole in STARTS:
        code, said = start(moment, [*command, "--out", str(disturbed)], tmp_path)
        assert code == ending, f"{moment}: exit code {code}\n{said}"
        assert checkpoints(disturbed) >= whole, moment
        assert done(disturbed) == (moment == "never"), moment
        assert ("saved step 13" in said) == (moment == "SIGTERM at step 13"), said
    assert not list(folder(disturbed).glob("checkpoints/*tmp*"))
    same_state(undisturbed, disturbed)
    same_rows(undisturbed, disturbed)


def start(moment: str, arguments: list[str], tmp_path: Path) -> tuple[int, str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if moment != COMPILED_ANEW:
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, str(CHILD), moment, *arguments]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    return ended.returncode, ended.stdout + ended.stderr


def folder(out: Path) -> Path:
    (found,) = out.glob("tiny-*/0")
    return found


def checkpoints(out: Path) -> set[int]:
    return {int(path.name) for path in folder(out).glob("checkpoints/*") if path.name.isdigit()}


def done(out: Path) -> bool:
    return (folder(out) / "done.json").exists()


def same_state(first: Path, second: Path) -> None:
    """Weights, optimizer and counters of the last checkpoint, bit for bit."""
    states = [ocp.load((folder(out) / "checkpoints" / "24").absolute()) for out in (first, second)]
    leaves = [jax.tree.leaves_with_path(state) for state in states]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    assert len(leaves[0]) > 30  # three copies of a dozen weights
    for (path, one), (_, other) in zip(*leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), jax.tree_util.keystr(path)


def same_rows(first: Path, second: Path) -> None:
    """Every row once and in order, and equal apart from timings; so are the closing records."""
    rows = [read_rows(folder(out) / "metrics.jsonl") for out in (first, second)]
    assert [row["step"] for row in rows[0]] == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    assert len({row["loss"] for row in rows[0]}) == 10
    closing = [json.loads((folder(out) / "done.json").read_text()) for out in (first, second)]
    for one, other in [*zip(*rows, strict=True), closing]:
        assert one.keys() == other.keys()
        for name in one.keys() - {*TIMINGS, "compile_seconds"}:
            # A loss over held-out text is a sum whose last float32 bit was once seen to differ, under heavy
            # load, between two evaluations of the same weights; what training computes never was.
            wanted = pytest.approx(one[name], rel=1e-6) if name.startswith("val_loss") else one[name]
            assert other[name] == wanted, (one.get("step"), name)
