"""Rows sorted by expert for tests of the grouped matmul, and their products in float64, one by one."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.dispatching.grouped import BACKENDS
from switchmoe.dispatching.grouped.base import as_they_are
from switchmoe.dispatching.grouped_matmul import grouped_matmul

from .worlds import assert_close_to_peak

# Rows of four experts out of 200: unaligned, an empty expert, unused rows; none at all; a full tile first.
SIZES = ([70, 0, 90, 40], [0, 3, 30, 0], [0, 0, 0, 0], [128, 1, 0, 64])
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def make_rows(seed, dtype, size_E, rows=200, d_in=64, d_out=192):
    """Inputs whose unused rows and idle experts are NaN, and the same in float64 with 0 there."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, d_in), (len(size_E), d_in, d_out), (rows, d_out))
    x, w, g = (np.array(jnp.asarray(rng.standard_normal(shape), dtype), np.float64) for shape in shapes)
    used, idle = sum(size_E), np.array(size_E) == 0
    x[used:], g[used:], w[idle] = 0, 0, 0
    clean = (x.copy(), w.copy(), g.copy())
    x[used:], g[used:], w[idle] = np.nan, np.nan, np.nan
    return clean, tuple(jnp.asarray(array, dtype) for array in (x, w, g))


def by_hand(x, w, g, size_E):
    """Each expert's rows times its matrix, back through it, and their outer products."""
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(size_E)
    for expert, (start, end) in enumerate(zip(ends - size_E, ends, strict=True)):
        y[start:end] = x[start:end] @ w[expert]
        dx[start:end] = g[start:end] @ w[expert].T
        dw[expert] = x[start:end].T @ g[start:end]
    return y, dx, dw


def run_backend(backend, dtype, sizes=SIZES, shape=None, to_product=None, to_gradient=None, **options):
    """Compare both of a backend's products with those by hand, for each of `sizes`, compiled once.

    `shape` goes to `make_rows`; `to_product` and `to_gradient` are options of one product, `options` of both.
    """
    product = jax.jit(partial(backend.product, **options, **(to_product or {})))
    product_back = jax.jit(partial(backend.product, transpose_w=True, **options, **(to_product or {})))

    @jax.jit
    def weight_gradient(x, w, g, size):
        clean = getattr(backend, "clean", as_they_are)
        rows = (clean(rows, w, size) for rows in (x, g))
        return backend.weight_gradient(*rows, size, **options, **(to_gradient or {}))

    for seed, size_E in enumerate(sizes):
        clean, (x, w, g) = make_rows(seed, dtype, size_E, **(shape or {}))
        size = jnp.array(size_E)
        results = (product(x, w, size), product_back(g, w, size), weight_gradient(x, w, g, size))
        for name, result, expected in zip(("y", "dx", "dw"), results, by_hand(*clean, size_E), strict=True):
            assert result.dtype == dtype
            # Where the expectation is all 0 this asks for exactly 0.
            assert_close_to_peak(result, expected, TOLERANCE[dtype], f"{name} of {size_E}")
        assert not np.any(np.asarray(results[2], np.float32)[np.array(size_E) == 0])


def run_gradient(backend, dtype, size_E, **shape):
    """Compare a product and both of its gradients as `grouped_matmul` takes them with those by hand.

    Rows behind the last group hold NaN, those of the gradient that comes back too.
    """
    clean, (x, w, g) = make_rows(len(size_E), dtype, size_E, **shape)
    with mock.patch.dict(BACKENDS, {"tested": backend._replace(available=lambda *_: "")}):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(size_E), implementation="tested"), x, w)
    for name, result, expected in zip(("y", "dx", "dw"), (y, *pull(g)), by_hand(*clean, size_E), strict=True):
        assert_close_to_peak(result, expected, TOLERANCE[dtype], f"{name} of {size_E}")
