"""Settings that must stand before any test imports switchmoe: the platform, the shape checks, hypothesis."""

import os

# Before jax is imported anywhere: tests run on the CPU unless somebody asks for another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
