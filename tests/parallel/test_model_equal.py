"""One step of a model, from two states of a run, is the same step on every mesh.

This is a selection; tests/full has the product of meshes and transports, and runs of 200 steps.
"""

import pytest

from tests.devices import run_on_devices
from tests.parallel.worlds import QUICKLY, SETUP

# Every mesh with a transport. Dropless rows travel in test_layer_equal.py and in tests/train/mesh_steps.py.
WAYS = {
    "gather": [
        ((8, 1, 1, 1), "all_to_all"),  # where nothing travels
        ((4, 1, 2, 1), "all_gather"),
        ((2, 1, 4, 1), "all_to_all"),
        ((1, 1, 8, 1), "all_gather"),
        ((2, 2, 2, 1), "all_to_all"),
        ((2, 1, 2, 2), "all_gather"),
    ]
}
BODY = "from tests.parallel.model_worlds import *; check_meshes(Path({work!r}), {ways})"


@pytest.mark.timeout(300)
def test_a_step_from_two_states_is_the_same_on_every_mesh(tmp_path):
    body = SETUP + BODY.format(work=str(tmp_path), ways=WAYS)
    said = run_on_devices(8, body, timeout=280, environment=QUICKLY).splitlines()
    assert len(said) == 12
    # Of 2 sparse layers x 8 rows x 32 places at most one choice is so close that rounding decides it, whose
    # row is not compared any further.
    for line in said:
        compared, flipped = map(int, line.split()[-2:])
        assert compared >= 480 and flipped <= 1, line
