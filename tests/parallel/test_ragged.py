"""Dropless rows over a mesh: with room for all the layer is exact, with less it counts what it lost."""

from tests.devices import run_on_devices
from tests.parallel.worlds import QUICKLY, SETUP


def test_rows_that_find_room_are_served_and_the_others_are_counted():
    body = SETUP + "from tests.parallel.ragged_steps import check; check((2, 1, 4, 1))"
    said = [
        line.split()[0] for line in run_on_devices(8, body, timeout=200, environment=QUICKLY).splitlines()
    ]
    assert said == ["all"] * 3 + ["some"] * 3
