"""The layer on a mesh, whatever placement its arguments come with, and inside jax's transformations."""

from pathlib import Path

import pytest

from tests.devices import run_on_devices
from tests.parallel.worlds import QUICKLY

STEPS = Path(__file__).with_name("placement_steps.py")


@pytest.mark.timeout(300)
def test_rows_in_the_wrong_place_give_the_right_result_or_an_error():
    """A batch not split over the experts' axis gave wrong results without an error elsewhere (marin PR 7932).

    Also in the same process, since starting one takes seconds: the layer in a scan, rematerialised, with
    donated rows, and on a mesh of one device.
    """
    said = [
        line.split()[0] for line in run_on_devices(8, STEPS, timeout=280, environment=QUICKLY).splitlines()
    ]
    assert said[:5] == ["placed"] * 5
    assert len(said[5:7]) == 2 and set(said[5:7]) <= {"refused", "moved"}
    assert said[7:] == ["transformed", "alone", "alone"]
