"""Two processes started by hand: the same losses as from one, and what a failure of one does to both."""

import json
import signal

import numpy as np
import pytest

from tests.cluster.runs import assert_same_run, by_hand, flags, folder_of, rows, saved_steps, wait_for
from tests.processes import once_more

pytestmark = pytest.mark.timeout(900)


@once_more
def test_two_processes_give_what_one_gives(cache, tmp_path):
    """Two processes of four devices and one of eight: every step's loss to 1e-6, and the same files."""
    outs = {count: tmp_path / f"runs-{count}" for count in (1, 2)}
    for count, out in outs.items():
        arguments = [flags(out, data=2, expert=4, steps=6)] * count
        with by_hand(arguments, cache, tmp_path, devices=8 // count) as started:
            for process in started:
                assert process.wait(300) == 0, process.wrote()
        if count == 2:
            assert "on 8 devices in 2 processes" in started[0].wrote()
            assert "step" not in started[1].wrote(), "process 1 wrote to the screen too"
    one, two = rows(outs[1]), rows(outs[2])
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-6)
    np.testing.assert_allclose(two[-1]["val_loss"], one[-1]["val_loss"], rtol=1e-6)
    names = [{path.name for path in folder_of(out).iterdir()} for out in outs.values()]
    assert names[0] == names[1] and saved_steps(outs[1]) == saved_steps(outs[2]) == [6]
    assert json.loads((folder_of(outs[2]) / "env.json").read_text())["process_count"] == 2


@once_more
def test_a_lost_process_ends_the_other_and_the_same_command_resumes(cache, undisturbed, tmp_path):
    """First process 1 is killed in training, then process 0; the third start comes to the undisturbed end."""
    out = tmp_path / "runs"
    for victim, after in ((1, 25), (0, 45)):
        with by_hand([flags(out)] * 2, cache, tmp_path) as started:
            wait_for(lambda until=after: len(rows(out)) >= until, 240, f"row {after}")
            started[victim].process.send_signal(signal.SIGKILL)
            assert started[1 - victim].wait(60) == 4, started[1 - victim].wrote()
            said = [line for line in started[1 - victim].wrote().splitlines() if line.startswith("error: ")]
            assert len(said) == 1, started[1 - victim].wrote()
            assert said[0].startswith(
                f"error: process {1 - victim} of 2 stops since another process was lost ("
            )
    with by_hand([flags(out)] * 2, cache, tmp_path) as started:
        for process in started:
            assert process.wait(300) == 0, process.wrote()
    assert json.loads((folder_of(out) / "env.json").read_text())["start_step"] == 40
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize(
    "index, change, sentence",
    [
        (1, ["--optimizer.learning-rate", "0.1"], "process 1 of 2 has another run folder"),
        (0, ["--mesh.data", "4", "--mesh.expert", "1"], "process 1 of 2 has another "),
        (1, ["--data.cache-dir", "setup.cfg/cache"], "process 1 of 2: "),
    ],
)
@once_more
def test_processes_that_disagree(cache, tmp_path, index, change, sentence):
    """Another configuration or mesh, or texts that one can't read: both say so and exit with 2."""
    arguments = [flags(tmp_path / "runs"), flags(tmp_path / "runs")]
    arguments[index] += change
    with by_hand(arguments, cache, tmp_path) as started:
        for process in started:
            assert process.wait(120) == 2, process.wrote()
            assert f"error: {sentence}" in process.wrote()
