"""For tests whose time is spent on compiling what hardly runs."""

import contextlib

import jax


@contextlib.contextmanager
def compiled_quickly():
    """Leave most of XLA's optimisations out; numbers differ by rounding alone."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
