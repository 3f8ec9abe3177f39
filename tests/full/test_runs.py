"""Runs of 200 steps on meshes beside one device: exact with its choices, else as near as rounding lets.

Minutes of work, so it is not part of `make test`: run `python -m pytest tests/full`.
"""

import pytest

from tests.devices import run_on_devices
from tests.parallel.worlds import QUICKLY

BODY = "from tests.full.runs import *; {name}(Path({work!r}), {arguments})"


def say(name: str, work, arguments: str) -> list[list[str]]:
    """The lines that one of the checks in runs.py prints, the last word being a number."""
    body = BODY.format(name=name, work=str(work), arguments=arguments)
    return [
        line.rsplit(maxsplit=1)
        for line in run_on_devices(8, body, timeout=1500, environment=QUICKLY).splitlines()
    ]


@pytest.mark.timeout(1600)
def test_with_the_choices_of_one_device_200_steps_on_a_mesh_have_its_losses(tmp_path):
    said = say("check_replayed", tmp_path, "[(2, 1, 4, 1), (1, 2, 2, 2)]")
    assert len(said) == 2
    for mesh, apart in said:
        assert float(apart) < 1e-4, mesh


@pytest.mark.timeout(1600)
def test_free_runs_on_a_mesh_are_as_near_as_those_from_weights_next_to_them(tmp_path):
    said = {
        name: float(number) for name, number in say("check_free", tmp_path, "[(2, 1, 4, 1), (8, 1, 1, 1)], 6")
    }
    spread = said.pop("spread")
    assert said.pop("other noise") > 3 * spread
    assert len(said) == 2
    for mesh, apart in said.items():
        assert apart <= spread, mesh
