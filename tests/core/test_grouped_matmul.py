"""The grouped matmul: every backend that runs here against a plain loop, forward and both gradients."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmoe.dispatching.grouped import BACKENDS
from switchmoe.dispatching.grouped.blocks import cut_into_pieces, piece_sizes
from switchmoe.dispatching.grouped_matmul import grouped_matmul
from tests.checks import unchecked

from .worlds import assert_close_to_peak

HERE = [name for name, backend in BACKENDS.items() if not backend.available("cpu")]
IN, OUT = 3, 5


@jax.jit(static_argnames="implementation")
def value_and_gradients(x_RI, w_EIO, size_E, g_RO, implementation=None):
    def product(x_RI, w_EIO):
        return grouped_matmul(x_RI, w_EIO, size_E, implementation=implementation)

    y_RO, pull_back = jax.vjp(product, x_RI, w_EIO)
    return y_RO, *pull_back(g_RO)


def by_hand(x_RI, w_EIO, sizes, g_RO):
    """The product and both gradients, one expert after the other, in float64."""
    y_RO, dx_RI = np.zeros(g_RO.shape), np.zeros(x_RI.shape)
    dw_EIO = np.zeros(w_EIO.shape)
    start = 0
    for expert, size in enumerate(sizes):
        mine = slice(start, start + size)
        x, w, g = (np.asarray(a, np.float64) for a in (x_RI[mine], w_EIO[expert], g_RO[mine]))
        if size:
            y_RO[mine], dx_RI[mine], dw_EIO[expert] = x @ w, g @ w.T, x.T @ g
        start += size
    return y_RO, dx_RI, dw_EIO


def make_world(sizes, num_rows, dtype=jnp.float32, seed=0):
    """Rows, weights and output gradients with NaN wherever the result must not look."""
    rng = np.random.default_rng(seed)
    x_RI, g_RO = rng.standard_normal((num_rows, IN)), rng.standard_normal((num_rows, OUT))
    w_EIO = rng.standard_normal((len(sizes), IN, OUT))
    x_RI[sum(sizes) :] = g_RO[sum(sizes) :] = np.nan
    w_EIO[np.array(sizes) == 0] = np.inf
    x_RI, w_EIO, g_RO = (jnp.asarray(a, dtype) for a in (x_RI, w_EIO, g_RO))
    return x_RI, w_EIO, jnp.asarray(sizes, jnp.int32), g_RO


def assert_right(sizes, num_rows, implementation, dtype=jnp.float32, tolerance=1e-5):
    world = make_world(sizes, num_rows, dtype)
    x_RI, w_EIO, _, g_RO = (np.asarray(a, np.float64) for a in world)
    results = value_and_gradients(*world, implementation=implementation)
    for name, actual, expected in zip(
        "y dx dw".split(), results, by_hand(x_RI, w_EIO, sizes, g_RO), strict=True
    ):
        assert actual.dtype == dtype, name
        assert_close_to_peak(actual, expected, tolerance, f"{implementation} {name} {sizes} of {num_rows}")
    y_RO, dx_RI, dw_EIO = results
    assert not np.any(y_RO[sum(sizes) :]) and not np.any(dx_RI[sum(sizes) :])
    assert not np.any(dw_EIO[np.array(sizes) == 0])


@pytest.mark.parametrize("implementation", [None, *HERE])
def test_golden(implementation):
    # Expert 0 doubles and takes one row, expert 1 has none (and a NaN), expert 2 multiplies by 10 and takes
    # two; the last row is nobody's. y = 2 * 1, 10 * 3, 10 * 4, 0. With output gradients 1, 5, 6, 7 the rows
    # get 2 * 1, 10 * 5, 10 * 6, 0 and the weights 1 * 1, 0, 3 * 5 + 4 * 6 = 39.
    x_RI, g_RO = jnp.array([[1.0], [3.0], [4.0], [jnp.nan]]), jnp.array([[1.0], [5.0], [6.0], [7.0]])
    w_EIO, size_E = jnp.array([[[2.0]], [[jnp.nan]], [[10.0]]]), jnp.array([1, 0, 2])
    y_RO, dx_RI, dw_EIO = value_and_gradients(x_RI, w_EIO, size_E, g_RO, implementation=implementation)
    np.testing.assert_array_equal(y_RO[:, 0], [2, 30, 40, 0])
    np.testing.assert_array_equal(dx_RI[:, 0], [2, 50, 60, 0])
    np.testing.assert_array_equal(dw_EIO[:, 0, 0], [1, 0, 39])


@pytest.mark.parametrize("implementation", [None, *HERE])
@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 11, 1], [0, 0, 0, 0], [0, 0, 0, 23], [23, 0, 0, 0], [16, 1, 0, 5]],
    ids=["unaligned", "nobody", "all in the last", "all in the first", "aligned and not"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_equals_a_plain_loop(sizes, implementation, dtype):
    # The oracle sees the rounded inputs, so all that is left of bfloat16 is rounding the result: 2**-9.
    assert_right(sizes, 23, implementation, dtype, tolerance=1e-5 if dtype == jnp.float32 else 2**-8)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_blocks_with_any_sizes(sizes):
    assert_right(sizes, 160, "blocks")


def test_blocks_with_more_rows_than_the_largest_piece():
    # An even share is 160 / 8 = 20 rows, so no piece has more than 40. The first expert needs three, the last
    # two, and those end where the rows do.
    sizes, num_rows = [81, 7, 0, 0, 0, 0, 0, 72], 160
    assert piece_sizes(num_rows, 8)[-1] == 40
    assert_right(sizes, num_rows, "blocks")
    table_P3, end_of_kind = cut_into_pieces(jnp.array(sizes), num_rows, piece_sizes(num_rows, 8))
    found = [(e, f, t) for e, f, t in table_P3[end_of_kind[0] : end_of_kind[-1]].tolist()]
    assert sorted(found) == [(0, 0, 27), (0, 27, 54), (0, 54, 81), (1, 81, 88), (7, 88, 124), (7, 124, 160)]


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_few_rows(num_rows):
    assert_right([0, num_rows, 0, 0], num_rows, "blocks")


def test_many_small_products_in_bfloat16_add_up_in_float32():
    # A bfloat16 sum of ones stops at 256, where 256 + 1 rounds to 256. An even share is 512 / 4 = 128 rows,
    # so all 512 at one expert are two pieces at least.
    ones, weights = jnp.ones((512, 1), jnp.bfloat16), jnp.ones((4, 1, 1), jnp.bfloat16)
    for implementation in HERE:
        _, _, dw = value_and_gradients(
            ones, weights, jnp.array([0, 512, 0, 0]), ones, implementation=implementation
        )
        assert dw[:, 0, 0].tolist() == [0, 512, 0, 0], implementation


@pytest.mark.parametrize("implementation", HERE)
def test_inside_scan_remat_and_without_compiling_again(implementation):
    rng = np.random.default_rng(1)
    x_RI = jnp.asarray(rng.standard_normal((9, IN)), jnp.float32)
    w_LEII = jnp.asarray(rng.standard_normal((2, 3, IN, IN)), jnp.float32)

    @jax.jit
    def run(w_LEII, size_E):
        @jax.checkpoint
        def layer(x_RI, w_EII):
            return grouped_matmul(x_RI, w_EII, size_E, implementation=implementation), None

        return jax.value_and_grad(lambda w: jnp.sum(jax.lax.scan(layer, x_RI, w)[0] ** 2))(w_LEII)

    for sizes in ([4, 0, 3], [0, 9, 0]):
        value, gradient = run(w_LEII, jnp.array(sizes))
        expert_R = np.repeat(np.arange(3), sizes)

        def plain(w_LEII, expert_R=expert_R):
            y_RI = x_RI[: len(expert_R)]
            for w_EII in w_LEII:
                y_RI = jnp.einsum("RI,RIO->RO", y_RI, w_EII[expert_R])
            return jnp.sum(y_RI**2)

        expected, expected_gradient = jax.value_and_grad(plain)(w_LEII)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        assert_close_to_peak(gradient, expected_gradient, 1e-5, str(sizes))
    assert run._cache_size() == 1


def test_rejects_what_does_not_fit():
    x, w, size = jnp.ones((4, IN)), jnp.ones((2, IN, OUT)), jnp.array([2, 2])
    with unchecked():
        with pytest.raises(ValueError, match="do not fit"):
            grouped_matmul(x, jnp.ones((2, OUT, IN)), size)
        with pytest.raises(ValueError, match="do not fit"):
            grouped_matmul(x, w, jnp.array([1, 1, 2]))
        with pytest.raises(ValueError, match=r"needs x \[R, I\]"):
            grouped_matmul(x[0], w, size)
        with pytest.raises(ValueError, match="both bfloat16; cast one"):
            grouped_matmul(x.astype(jnp.bfloat16), w, size)
        with pytest.raises(ValueError, match="did you mean 'blocks'"):
            grouped_matmul(x, w, size, implementation="block")
    for name in set(BACKENDS) - set(HERE):
        with pytest.raises(ValueError, match=f"matmul='{name}' can't run here: .+\\."):
            grouped_matmul(x, w, size, implementation=name)


# Mistake 8: "sparse" code that computes every expert for every token.


def random_sizes(num_rows, num_experts):
    return np.bincount(np.random.default_rng(0).integers(0, num_experts, num_rows), minlength=num_experts)


@pytest.mark.parametrize("num_experts", [8, 64])
def test_work_of_blocks_does_not_grow_with_the_experts(num_experts):
    num_rows, d_in, d_out = 2048, 16, 32
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((num_rows, d_in), (num_experts, d_in, d_out), (num_rows, d_out))
    ]
    sizes = jnp.asarray(random_sizes(num_rows, num_experts), jnp.int32)
    kinds = piece_sizes(num_rows, num_experts)
    _, end_of_kind = cut_into_pieces(sizes, num_rows, kinds)
    trips = np.diff(end_of_kind)

    blocks = BACKENDS["blocks"]
    for name, compute in {
        "product": jax.jit(lambda x, w, g, size: blocks.product(x, w, size)),
        "to the input": jax.jit(lambda x, w, g, size: blocks.product(g, w, size, transpose_w=True)),
        "to the weights": jax.jit(lambda x, w, g, size: blocks.weight_gradient(x, g, size)),
    }.items():
        # XLA counts the body of a loop once, and there is one loop a kind: a product with that many rows, and
        # next to it a little for masks, indices and sums. So the trips are all that is missing.
        counted = compute.lower(*shapes, sizes).compile().cost_analysis()["flops"]
        once = sum(2 * rows * d_in * d_out for rows in kinds)
        assert once <= counted <= 1.25 * once, (name, counted / once)
        executed = (
            counted / once * sum(2 * rows * d_in * d_out * n for rows, n in zip(kinds, trips, strict=True))
        )
        ideal = 2 * num_rows * d_in * d_out
        assert ideal <= executed <= 1.6 * ideal, (name, executed / ideal)


def test_time_of_blocks_does_not_grow_with_the_experts():
    num_rows, d_in, d_out = 2048, 128, 256
    rng = np.random.default_rng(0)

    def make(num_experts):
        shapes = ((num_rows, d_in), (num_experts, d_in, d_out), (num_rows, d_out))
        x_RI, w_EIO, g_RO = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
        return x_RI, w_EIO, jnp.asarray(random_sizes(num_rows, num_experts)), g_RO

    best = {}
    worlds = {num_experts: make(num_experts) for num_experts in (8, 64)}
    for _ in range(8):  # the first round compiles
        for num_experts, world in worlds.items():
            start = time.process_time()
            jax.block_until_ready(value_and_gradients(*world))
            best[num_experts] = min(best.get(num_experts, np.inf), time.process_time() - start)
    assert best[64] <= 3 * best[8], best
