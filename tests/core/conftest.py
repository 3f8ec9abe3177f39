"""These tests compile hundreds of small programs and run each once or twice, so they are compiled quickly."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
    """Switch the compiler's optimisations off for this folder alone; the other suites run with them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
