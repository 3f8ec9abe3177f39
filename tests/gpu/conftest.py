"""These tests fail without a GPU, since they run only where somebody names them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def on_a_gpu():
    """Ask for full float32 products: XLA's default on a GPU rounds their inputs to 10 bits (tf32)."""
    if jax.default_backend() != "gpu" or not jax.devices("cpu"):
        pytest.fail(f"jax runs on {jax.default_backend()}; on a GPU machine set JAX_PLATFORMS=cuda,cpu.")
    with jax.default_matmul_precision("highest"):
        yield
