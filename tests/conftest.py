"""Settings that must stand before any test imports switchmoe: the platform, the shape checks, hypothesis."""

import os
from pathlib import Path

# Before jax is imported anywhere: tests run on the CPU unless somebody asks for another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gc

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.checks import install_checks

# Every jaxtyping annotation of the package is checked with beartype while the tests run, and only then.
install_checks()

# Compilation makes the first example slow, so no deadline; derandomised, so that a failure comes back.
settings.register_profile(
    "switchmoe",
    deadline=None,
    max_examples=15,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("switchmoe")


# Minutes of work each, or for a machine with a GPU: these tests run only where the command line names them.
ONLY_IF_NAMED = ("cluster", "full", "gpu", "live")


def pytest_ignore_collect(collection_path, config):
    folder = next(
        (Path(__file__).parent / name for name in ONLY_IF_NAMED if name in collection_path.parts), None
    )
    if folder is None or not collection_path.is_relative_to(folder):
        return None
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(folder) for path in named) else True


# Linux lets a process map 65,530 pieces of memory unless told otherwise, and XLA:CPU crashes beyond that.
MANY_MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Forget compiled programs between files where there are many: each of their kernels is mapped."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
