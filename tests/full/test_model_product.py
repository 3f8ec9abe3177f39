"""One step of a model from two states of a run: every mesh with every transport.

Minutes of work, so it is not part of `make test`: run `python -m pytest tests/full`.
"""

import itertools

import pytest

from tests.devices import run_on_devices
from tests.parallel.test_model_equal import BODY
from tests.parallel.worlds import MESHES, QUICKLY, SETUP

FIRST, *OTHERS = MESHES  # on the first one nothing travels
WAYS = {
    "gather": [(FIRST, "all_to_all"), *itertools.product(OTHERS, ("all_to_all", "all_gather"))],
    "dropless": [(FIRST, "all_gather"), *itertools.product(OTHERS, ("ragged_all_to_all", "all_gather"))],
}


@pytest.mark.timeout(1600)
def test_a_step_from_two_states_is_the_same_on_every_mesh_with_every_transport(tmp_path):
    body = SETUP + BODY.format(work=str(tmp_path), ways=WAYS)
    said = run_on_devices(8, body, timeout=1500, environment=QUICKLY).splitlines()
    assert len(said) == 2 * 2 * (1 + 2 * len(OTHERS))  # from both states
    for line in said:
        compared, flipped = map(int, line.split()[-2:])
        assert compared >= 480 and flipped <= 1, line
