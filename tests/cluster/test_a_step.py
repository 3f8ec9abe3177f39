"""One step of a model on a mesh of two processes is that of one device: loss, gradients, choices, seats."""

import pytest

from tests.parallel.test_model_equal import BODY
from tests.parallel.worlds import SETUP
from tests.processes import run_processes

WAYS = {"gather": [((2, 1, 4, 1), "all_to_all"), ((1, 2, 4, 1), "all_gather")]}
START = """
import os
import jax
processes.initialize(LAUNCH)
work = os.path.join({work!r}, str(INDEX))  # each trains the same states for itself
os.makedirs(work, exist_ok=True)
"""


@pytest.mark.timeout(1300)
def test_a_step_on_two_processes_is_that_of_one_device(tmp_path):
    body = START.format(work=str(tmp_path)) + SETUP + BODY.replace("{work!r}", "work").format(ways=WAYS)
    for ended in run_processes(body, devices=4, seconds=300, timeout=600):
        assert ended.code == 0, ended.err
        said = ended.out.splitlines()
        assert len(said) == 4
        for line in said:
            compared, flipped = map(int, line.split()[-2:])
            assert compared >= 480 and flipped <= 1, line
