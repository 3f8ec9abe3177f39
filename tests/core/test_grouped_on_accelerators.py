"""The grouped matmul of TPU and GPU, as far as a CPU can tell: in Pallas's interpreters, and lowered only.

Releases of jax after 0.10 have an interpreter for GPU kernels; before, the Hopper kernels are just lowered.
The compilers themselves are asked by benchmarks/compile_grouped.py.
"""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import hlo, tiles
from switchmoe.dispatching.grouped import megablox, mosaic_gpu
from switchmoe.dispatching.grouped_matmul import grouped_matmul

from .rows_by_expert import SIZES, by_hand, make_rows, run_backend, run_gradient
from .worlds import assert_close_to_peak

HOPPER = SimpleNamespace(device_kind="H100", compute_capability="9.0", core_count=132, platform="gpu")
INTERPRETER = getattr(plgpu, "force_gpu_interpret_mode", None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_megablox_in_the_interpreter(dtype):
    run_backend(megablox, dtype, interpret=True)


def test_megablox_with_tiles_that_divide_nothing():
    """A dimension in several tiles, the last one not full; rows fewer than a tile."""
    with mock.patch.object(megablox, "_GRADIENT_TILE", 128), mock.patch.object(megablox, "_MAX_INNER", 128):
        with mock.patch.object(
            megablox, "_outputs_that_fit", lambda inner, itemsize: 128 if inner <= 128 else 0
        ):
            assert megablox.product_tile(200, 300, 4) == (128, 128)
            size_E = [9, 0, 2]
            clean, (x, w, g) = make_rows(0, "float32", size_E, rows=13, d_in=200, d_out=300)
            y = megablox.product(x, w, jnp.array(size_E), interpret=True)
            dw = megablox.weight_gradient(x, g, jnp.array(size_E), interpret=True)
    y_expected, _, dw_expected = by_hand(*clean, size_E)
    assert_close_to_peak(y, y_expected)
    assert_close_to_peak(dw, dw_expected)


@pytest.mark.parametrize("backend", [megablox, mosaic_gpu])
def test_without_rows(backend):
    x, w, size = (
        jnp.zeros((0, 64), jnp.bfloat16),
        jnp.full((2, 64, 128), jnp.nan, jnp.bfloat16),
        jnp.zeros(2, int),
    )
    assert backend.product(x, w, size).shape == (0, 128)
    assert not np.any(backend.weight_gradient(x, jnp.zeros((0, 128), jnp.bfloat16), size))


def test_mosaic_gpu_in_the_interpreter():
    with mock.patch("jax.devices", lambda *_: [HOPPER]):
        if INTERPRETER is None:
            lowered = lower_for("cuda", mosaic_gpu.product, "bfloat16")
            assert lowered.count("@mosaic_gpu_v2") == 1
            return
        with INTERPRETER():
            run_backend(mosaic_gpu, "bfloat16")
            run_gradient(mosaic_gpu.MOSAIC_GPU, "bfloat16", [70, 0, 90, 20])


def test_the_weight_gradient_s_rows_are_cleaned_once_and_not_copied():
    """Rows behind the last group become 0 for the product and for the weights' gradient together."""
    with mock.patch("jax.devices", lambda *_: [HOPPER]):
        text = lower_for("cuda", loss_gradient, "bfloat16")
    assert "dynamic_update_slice" not in text
    x, w, size = jnp.full((3, 2), jnp.nan), jnp.ones((2, 2, 2)), jnp.array([1, 0])
    np.testing.assert_array_equal(
        np.isnan(mosaic_gpu.clean(x, w, size)), [[True] * 2, [False] * 2, [False] * 2]
    )


def lower_for(platform, fn, dtype):
    """The program that would go to that platform's compiler, as text; traced anew each time."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((256, 64), (4, 64, 128))]
    traced = jax.jit(lambda *args: fn(*args)).trace(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def loss_gradient(x, w, size):
    return jax.grad(lambda x, w: grouped_matmul(x, w, size).astype(jnp.float32).sum(), (0, 1))(x, w)


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("tpu", "float32", "@tpu_custom_call"),
        ("tpu", "bfloat16", "@tpu_custom_call"),
        ("cuda", "bfloat16", "@mosaic_gpu_v2"),
    ],
)
def test_none_takes_the_platform_s_kernels(platform, dtype, kernel):
    with mock.patch("jax.devices", lambda *_: [HOPPER]):
        forward = lower_for(platform, grouped_matmul, dtype)
        backward = lower_for(platform, loss_gradient, dtype)
    for text, kernels in ((forward, 1), (backward, 2)):
        assert text.count(kernel) == kernels
        assert "stablehlo.dot_general" not in text and "chlo.ragged_dot" not in text


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "bfloat16"), ("cuda", "float32"), ("cuda", "bfloat16")]
)
def test_none_does_without_kernels_where_they_cannot_run(platform, dtype):
    """On a CPU, in float32 on a Hopper GPU, and on another GPU."""
    device = HOPPER if dtype == "float32" else SimpleNamespace(**vars(HOPPER) | {"compute_capability": "8.0"})
    with mock.patch("jax.devices", lambda *_: [device]):
        text = lower_for(platform, loss_gradient, dtype)
    assert "stablehlo.dot_general" in text and "custom_call @" not in text and "chlo.ragged_dot" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_inside_shard_map(platform):
    """The kernels do not say over which axes their results vary, and still run where shard_map checks it."""
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("expert")
    within = partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    with mock.patch("jax.devices", lambda *_: [HOPPER]):
        for check in (True, False):
            product = within(grouped_matmul, check_vma=check)
            gradient = jax.grad(lambda *arrays, f=product: f(*arrays).sum(), argnums=(0, 1))
            assert lower_for(platform, gradient, "bfloat16").count("custom_call @") >= 2, check


def test_inside_shard_map_the_kernel_gives_the_same():
    (x, w, _), (x_RI, w_EIO, _) = make_rows(0, "float32", SIZES[0])
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = partial(megablox.product, interpret=True)
    within = jax.shard_map(kernel, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
    got = jax.jit(within)(x_RI, w_EIO, jnp.array(SIZES[0]))
    assert_close_to_peak(got, by_hand(x, w, np.zeros((200, 192)), SIZES[0])[0])


@pytest.mark.parametrize("visited", [tiles.rows_visited_by_megablox, tiles.rows_visited_by_mosaic_gpu])
@pytest.mark.parametrize("kernel", ["product", "weight_gradient"])
def test_tiles_visited(visited, kernel):
    """At most 1.5 times the ideal on average at 64 experts and 16,384 rows, and never fewer than the rows."""
    count = jax.jit(jax.vmap(partial(visited, num_rows=16384, kernel=kernel)))
    for sizes, size_NE in tiles.draw_sizes(50, 16384, 64).items():
        ratio_N = np.asarray(count(size_NE)) / 16384
        assert ratio_N.min() >= 1 and ratio_N.mean() <= 1.5, (sizes, ratio_N.mean())


def test_tiles_of_a_worked_case():
    """Rows 0-129, none, 130-255: the first expert has tiles 0 and 1, the third tile 1: three tiles of 128."""
    size_E = jnp.array([130, 0, 126])
    on_tpu = jax.jit(tiles.rows_visited_by_megablox, static_argnums=(1, 2))
    assert on_tpu(size_E, 256, "product") == 3 * 128
    # The weight gradient goes to the expert without rows too, to write its zeros.
    assert on_tpu(size_E, 256, "weight_gradient") == 4 * 128
    # Blocks of 64: the first has 0, 1 and 2, the third 2 and 3.
    assert tiles.rows_visited_by_mosaic_gpu(size_E, 256, "weight_gradient") == 5 * 64
    assert tiles.rows_visited_by_mosaic_gpu(size_E, 256, "product") == (4 + 2) * 64


def test_tiles_fit_into_fast_memory():
    """Rows, weights and results twice, sums once, within 16 MiB, and equal tiles with little waste."""
    for num_in, num_out in ((1024, 4096), (8192, 2048), (14336, 4096), (2080, 6144), (100, 300), (24, 40)):
        for itemsize in (2, 4):
            inner, outer = megablox.product_tile(num_in, num_out, itemsize)
            stored = 2 * itemsize * (128 * inner + inner * outer + 128 * outer) + 4 * 128 * outer
            assert stored <= 16 * 2**20 and outer > 0
            assert -(-num_out // outer) * outer <= 1.3 * num_out
    assert megablox.equal_tile(2080, 1024) == 768 and megablox.equal_tile(1024, 1024) == 1024


def test_where_the_kernels_cannot_run():
    assert "for TPU" in megablox.available("cpu") and not megablox.available("tpu")
    assert "NVIDIA" in mosaic_gpu.available("tpu")
    assert "9.0" in mosaic_gpu.available("cuda")  # no GPU in this process
    x, w, size = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((2, 64, 128), jnp.bfloat16), jnp.array([4, 4])
    with mock.patch("jax.devices", lambda *_: [HOPPER]):
        assert not mosaic_gpu.available("cuda") and not mosaic_gpu.available("cuda", x, w, size)
        assert "bfloat16" in mosaic_gpu.available("cuda", x.astype(jnp.float32), w, size)
    with pytest.raises(ValueError, match="multiples of 64"):
        mosaic_gpu.product(x[:, :32], w[:, :32], size)
    with pytest.raises(ValueError, match="bfloat16"):
        mosaic_gpu.weight_gradient(x.astype(jnp.float32), x, size)


def test_reading_a_program():
    """Products in plain text, in a library call, and the largest array; numbers worked out by hand."""
    text = """
  %x.1 = bf16[16,8]{1,0} parameter(0)
  %w.1 = bf16[8,32]{1,0} parameter(1)
  %y.1 = bf16[16,32]{1,0} dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z.1 = (bf16[16,16]{1,0}, s8[99]{0}) custom-call(%y.1, %y.1), custom_call_target="__cublas$gemm", \
backend_config={"gemm":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %k.1 = f32[2,3,5]{2,1,0} custom-call(%z.1), custom_call_target="tpu_custom_call"
"""
    assert hlo.products(text) == [2 * 16 * 32 * 8, 2 * 16 * 16 * 32]
    assert hlo.kernels(text) == 1 and hlo.largest_array(text) == 16 * 32
