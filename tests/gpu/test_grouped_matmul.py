"""Every backend of the grouped matmul that a GPU has, against products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatching.grouped import BACKENDS, mosaic_gpu
from switchmoe.dispatching.grouped_matmul import grouped_matmul
from tests.core.rows_by_expert import SIZES, by_hand, make_rows, run_backend, run_gradient
from tests.core.worlds import assert_close_to_peak

# megablox is for TPU; what else cannot run fails here, and does not stay away.
ON_GPU = [(name, dtype) for name in BACKENDS if name != "megablox" for dtype in ("float32", "bfloat16")]
ON_GPU.remove(("mosaic_gpu", "float32"))
# Unaligned, empty experts at both ends and in the middle, rows nobody uses; a single one; nearly all in one.
MANY = ([0, 130, 1, 0, 257, 64, 500, 0], [0, 0, 0, 1, 0, 0, 0, 0], [7, 0, 950, 0, 3, 1, 0, 2])
SHAPE = dict(rows=1000, d_in=256, d_out=384)
Tiles = mosaic_gpu.Tiles


@pytest.mark.parametrize(("name", "dtype"), ON_GPU)
def test_equals_products_in_float64(name, dtype):
    run_backend(BACKENDS[name], dtype)
    run_backend(BACKENDS[name], dtype, sizes=MANY, shape=SHAPE)
    for size_E in MANY:
        run_gradient(BACKENDS[name], dtype, size_E, **SHAPE)


@pytest.mark.parametrize(
    "tiles",
    [Tiles(64, 64), Tiles(128, 128, 128, 2, 1), Tiles(64, 128, 64, 5, 1), Tiles(128, 64, 128, 4, 2)],
    ids=lambda tiles: "x".join(map(str, tiles)),
)
def test_mosaic_gpu_with_other_tiles(tiles):
    run_backend(mosaic_gpu, "bfloat16", sizes=MANY, shape=SHAPE, tiles=tiles)


def test_mosaic_gpu_with_few_rows_and_many_experts():
    """Fewer rows than a tile has, as when one token is decoded, and as many experts as the kernel takes."""
    run_backend(mosaic_gpu, "bfloat16", sizes=([1, 0, 0, 0], [0, 2, 1, 2]), shape=dict(rows=5))
    sizes = np.bincount(np.random.default_rng(0).integers(0, 256, 600), minlength=256).tolist()
    run_backend(mosaic_gpu, "bfloat16", sizes=(sizes,), shape=dict(rows=640, d_in=64, d_out=64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fastest_in_a_scan_with_remat(dtype):
    """Two products one after the other, loaded unevenly: value and gradients, as a model takes them."""
    size_E = SIZES[0]
    (x, w, _), (x_RI, w_EIO, _) = make_rows(0, dtype, size_E, d_out=64)
    w_EIO = jnp.where(jnp.array(size_E)[:, None, None] > 0, w_EIO, 0) / 8  # so that values stay near 1
    w_LEIO = jnp.stack([w_EIO, w_EIO])
    ones = jnp.ones(x_RI.shape, dtype)

    @jax.jit
    def run(x_RI, w_LEIO, size):
        @jax.checkpoint
        def layer(x_RI, w_EIO):
            return grouped_matmul(x_RI, w_EIO, size), None

        y_RI, pull = jax.vjp(lambda x, w: jax.lax.scan(layer, x, w)[0], x_RI, w_LEIO)
        return y_RI, *pull(ones)

    arguments = (x_RI, w_LEIO, jnp.array(size_E))
    has_kernel = "mosaic_gpu" in run.lower(*arguments).compile().as_text()
    assert has_kernel == (dtype == "bfloat16" and not mosaic_gpu.available("cuda"))
    y, dx, dw = run(*arguments)

    w = w / 8
    hidden, _, _ = by_hand(x, w, np.zeros_like(x), size_E)
    g = np.zeros_like(x)
    g[: sum(size_E)] = 1
    expected_y, g_hidden, dw_second = by_hand(hidden, w, g, size_E)
    _, expected_dx, dw_first = by_hand(x, w, g_hidden, size_E)
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # the values between the two products are rounded too
    for name, got, expected in (
        ("y", y, expected_y),
        ("dx", dx, expected_dx),
        ("dw", dw, np.stack([dw_first, dw_second])),
    ):
        assert_close_to_peak(got, expected, tolerance, name)
