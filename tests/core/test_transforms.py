"""The layer under jit, grad, vmap, scan and checkpoint, and in both float types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm

from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_params, make_x, moe

COMPILATION = "/jax/core/compile/backend_compile_duration"
OPTIONS = dict(top_k=2, capacity_factor=0.8, jitter=0.1, expert_dropout=0.2)


def loss(params, x, config, key=None):
    y, aux = sm.moe(params, x, config, train=True, key=key)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))) + sm.aux_loss(aux, config)


@pytest.fixture
def compilations():
    """The names of what has been compiled so far, as a growing list."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == COMPILATION:
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_no_recompiling_for_the_same_shape(compilations):
    # An equal config, other numbers, another key: the compiled program serves all.
    function = jax.jit(sm.moe, static_argnames=("config", "train"))
    keys = [jax.random.key(seed) for seed in range(3)]
    worlds = [(make_params(seed), make_x(seed, 2, 6, 4)) for seed in range(3)]
    jax.block_until_ready((keys, worlds))
    counts = []
    for (params, x), key in zip(worlds, keys, strict=True):
        function(params, x, make_config(**OPTIONS), train=True, key=key)
        counts.append(len(compilations))
    assert counts[0] >= 1 and counts[1:] == counts[:-1]
    function(*worlds[0], make_config(**OPTIONS), train=False, key=keys[0])
    assert len(compilations) > counts[0]  # the listener does hear a compilation


def test_without_jit_the_same_and_compiled_once(compilations):
    # In a notebook every operation compiles by itself, but only the first time, and gives what jit gives.
    params, x, config = make_params(0), make_x(0, 2, 6, 4), make_config(top_k=2)
    answer = sm.moe(params, x, config)
    before = len(compilations)
    sm.moe(params, x, config)
    assert len(compilations) == before
    assert_trees_close(answer, moe(params, x, config))


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
def test_vmap_over_layers_is_a_loop(dispatch):
    # Two layers' parameters and inputs at once, forward and gradient, as a loop gives them.
    config, key = make_config(**OPTIONS, dispatch=dispatch), jax.random.key(1)
    worlds = [(make_params(seed), make_x(seed, 2, 6, 4)) for seed in (2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *worlds)
    function = functools.partial(loss, config=config, key=key)
    gradient = jax.value_and_grad(function, argnums=(0, 1))
    values, grads = jax.jit(jax.vmap(gradient))(*stacked)
    single = jax.jit(gradient)
    for i, world in enumerate(worlds):
        value, grad = single(*world)
        assert_close_to_peak(values[i], value)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], grads), grad)


@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
def test_scan_and_checkpoint_over_layers(dispatch):
    # Three layers, residual: scanned, scanned and rematerialised, and unrolled give one value and one
    # gradient; the scan stacks aux to [L, ...] and the summed losses are those of the layers added up.
    config = make_config(top_k=2, capacity_factor=0.8, dispatch=dispatch, z_coef=0.1)
    layers = [make_params(seed) for seed in (4, 5, 6)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = make_x(4, 2, 6, 4)

    def block(x, params):
        y, aux = sm.moe(params, x, config, train=True)
        return x + y, aux

    def scanned(stacked, body):
        y, aux = jax.lax.scan(body, x, stacked)
        return jnp.sum(jnp.sin(y)) + sm.aux_loss(aux, config), (y, aux)

    def unrolled(stacked):
        y, auxes = x, []
        for i in range(3):
            y, aux = block(y, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
            auxes.append(aux)
        losses = sum(sm.aux_loss(aux, config) for aux in auxes)
        return jnp.sum(jnp.sin(y)) + losses, (y, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes))

    def run(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))(stacked)

    (value, (y, aux)), grads = run(unrolled)
    assert all(leaf.shape[0] == 3 for leaf in aux) and (float(aux.dropped.min()) > 0) == (
        dispatch == "gather"
    )
    for body in (block, jax.checkpoint(block)):
        (scan_value, (scan_y, scan_aux)), scan_grads = run(functools.partial(scanned, body=body))
        assert_close_to_peak(scan_value, value)
        assert_close_to_peak(scan_y, y)
        assert_trees_close(scan_aux, aux)
        assert_trees_close(scan_grads, grads, 3e-5)


@pytest.mark.parametrize(("dispatch", "gated"), [("gather", True), ("einsum", False), ("dropless", True)])
def test_bf16_activations(dispatch, gated):
    # y comes in bf16, the sums in float32; routing is that of the same numbers in float32, so y agrees with
    # the float32 layer to bf16's precision (2**-8 a product, a few of them).
    config = make_config(top_k=2, eval_capacity_factor=0.8, gated=gated, dispatch=dispatch)
    x = make_x(7, 2, 6, 4).astype(jnp.bfloat16)
    params = make_params(7, gated=gated)
    wide_y, wide_aux = moe(params, x.astype(jnp.float32), config)
    for experts in (params.experts, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params.experts)):
        y, aux = moe(params._replace(experts=experts), x, config)
        assert y.dtype == jnp.bfloat16 and {leaf.dtype for leaf in aux} == {jnp.dtype("float32")}
        assert_close_to_peak(y.astype(jnp.float32), wide_y, 0.03)
        assert_trees_close(aux, wide_aux, 1e-6)
        np.testing.assert_array_equal(y == 0, wide_y == 0)


def test_gradients_keep_the_dtype_of_the_parameters():
    config = make_config(top_k=2, capacity_factor=0.8)
    params = make_params(8)
    narrow = params._replace(experts=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params.experts))
    x = make_x(8, 2, 6, 4).astype(jnp.bfloat16)
    grads = jax.jit(jax.grad(functools.partial(loss, config=config)))(narrow, x)
    assert jax.tree.map(lambda leaf: leaf.dtype, grads) == jax.tree.map(lambda leaf: leaf.dtype, narrow)
    wide = jax.jit(jax.grad(functools.partial(loss, config=config)))(params, x.astype(jnp.float32))
    assert_trees_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads), wide, 0.05)
