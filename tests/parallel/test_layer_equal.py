"""The layer on 8 devices is the layer on one: outputs, sums, gradients, dropped tokens, noise, traces.

This is a selection; tests/full has all routers, meshes and transports.
"""

import pytest

from switchmoe.parallel import EXECUTORS
from tests.devices import run_on_devices
from tests.parallel.layer_cases import SELECTION
from tests.parallel.worlds import QUICKLY, SETUP


def test_the_selection_tries_every_transport_on_two_meshes():
    tried = [(sizes, dict(case.how)["executor"]) for sizes, cases in SELECTION.items() for case in cases]
    for name in EXECUTORS:
        assert len({sizes for sizes, executor in tried if executor == name}) >= 2, name


@pytest.mark.timeout(300)
def test_a_layer_on_eight_devices_gives_what_it_gives_on_one():
    said = run_on_devices(8, SETUP + "compare(SELECTION)", timeout=280, environment=QUICKLY).splitlines()
    assert len(said) == sum(map(len, SELECTION.values()))
