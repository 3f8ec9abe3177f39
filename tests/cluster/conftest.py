"""These tests take minutes and a cluster: they run only where their folder is named (.ci/cluster.sh)."""

from pathlib import Path

import pytest

from tests.cluster.runs import by_hand, flags


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A folder for packed texts that all runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def undisturbed(cache, tmp_path_factory) -> Path:
    """The folder of a run of two processes on the mesh (2, 2) that went from its start to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with by_hand([flags(folder / "runs")] * 2, cache, folder) as started:
        for process in started:
            assert process.wait(300) == 0, process.wrote()
    return folder / "runs"
