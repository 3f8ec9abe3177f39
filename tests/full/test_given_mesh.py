"""Given weights, and a teacher's, on a mesh of 8 devices."""

from pathlib import Path

import pytest

from tests.devices import run_on_devices
from tests.parallel.worlds import QUICKLY

GIVEN = Path(__file__).with_name("given_on_a_mesh.py")


@pytest.mark.timeout(300)
def test_given_weights_and_a_teacher_are_split_like_any_others(tmp_path):
    environment = QUICKLY | {"WORK": str(tmp_path)}
    said = run_on_devices(8, GIVEN, timeout=280, environment=environment)
    assert said.split("\n")[0] == "(1, 4, 32, 32) (1, 2, 32, 16)"
