"""The layer on 8 devices against one: all routers, ways to dispatch, transports and features.

Minutes of work, so it is not part of `make test`: run `python -m pytest tests/full`.
"""

import pytest

from switchmoe.routing import ROUTERS
from tests.devices import run_on_devices
from tests.parallel.worlds import QUICKLY, SETUP


def say(body: str) -> list[list[str]]:
    """The lines that `compare` prints: four sizes, router, dispatch, executor."""
    said = run_on_devices(8, SETUP + body, timeout=1500, environment=QUICKLY)
    return [line.split() for line in said.splitlines()]


@pytest.mark.timeout(1600)
def test_every_router_with_every_dispatch_and_transport():
    said = say("compare(every_router_every_way())")
    assert {tuple(line[4:]) for line in said} >= {(router, "gather", "all_gather") for router in ROUTERS}
    assert len(said) == 6 * len(ROUTERS) - 4  # two routers have no dropless form


@pytest.mark.timeout(1600)
def test_everything_else_a_layer_can_have():
    assert len(say("compare(every_feature())")) == 30


@pytest.mark.timeout(600)
def test_other_rules_explicit_axes_narrow_activations_and_experts_in_a_loop():
    said = say(
        """
compare(OTHER_RULES)
compare({(1, 2, 2, 2): SELECTION[1, 2, 2, 2] + SELECTION[2, 2, 2, 1]}, axis_types="explicit")
compare(NARROW, tolerance=0.03)
import switchmoe.experts
switchmoe.experts.SMALL_PRODUCT = 0
compare({(2, 1, 4, 1): [make_case("switch"), make_case("top_k", "all_gather", **SHARED)]})
"""
    )
    assert len(said) == 10


@pytest.mark.timeout(600)
def test_ragged_rows_where_storage_and_hidden_features_are_split_too():
    said = say("from tests.parallel.ragged_steps import check; check((1, 2, 2, 2))")
    assert [line[0] for line in said] == ["all"] * 3 + ["some"]
