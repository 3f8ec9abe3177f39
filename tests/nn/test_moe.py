"""nn.MoE is the functional layer with its weights in nnx.Params, and nothing more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.layer import init_moe, moe
from switchmoe.nn import MoE

CONFIG = MoEConfig(d_model=8, d_ff=12, num_experts=4, router="top_k", top_k=2, drop_order="token")
X = jax.random.normal(jax.random.key(7), (4, 16, 8))


def names(module):
    return {path[-1]: leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.mark.parametrize("gated", [False, True])
def test_it_has_exactly_the_layer_s_weights(gated):
    module = MoE(dataclasses.replace(CONFIG, gated=gated), rngs=nnx.Rngs(0))
    shapes = {name: leaf[...].shape for name, leaf in names(module).items()}
    want = {"router_DE": (8, 4), "w_in_EDF": (4, 8, 12), "w_out_EFD": (4, 12, 8)}
    if gated:
        want["w_gate_EDF"] = (4, 8, 12)
    assert shapes == want
    assert all(type(leaf) is nnx.Param for leaf in names(module).values())


def test_it_computes_what_the_function_computes():
    module = MoE(CONFIG, rngs=nnx.Rngs(5))
    mask = jnp.arange(16) < jnp.array([16, 3, 9, 0])[:, None]
    y, aux = module(X, train=True, mask=mask)
    want_y, want_aux = moe(module.params(), X, CONFIG, train=True, mask=mask)
    np.testing.assert_array_equal(y, want_y)
    jax.tree.map(np.testing.assert_array_equal, aux, want_aux)
    assert float(aux.tokens) == 28 and float(aux.dropped) > 0
    same = init_moe(nnx.Rngs(5).params(), CONFIG, dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(module.w_in_EDF[...], same.experts.w_in_EDF)


def test_trace_says_where_tokens_went():
    module = MoE(CONFIG, rngs=nnx.Rngs(5))
    y, aux, trace = module.trace(X, train=True)
    np.testing.assert_array_equal(y, module(X, train=True)[0])
    assert trace.expert_SK.shape == trace.weight_SK.shape == trace.kept_SK.shape == (4, 16, 2)
    load = np.bincount(np.asarray(trace.expert_SK).ravel(), minlength=4)
    np.testing.assert_array_equal(load, aux.load_E)
    assert int((~trace.kept_SK).sum()) == int(aux.dropped) > 0
    lost = ~np.asarray(trace.kept_SK).any(-1)
    assert lost.any()
    np.testing.assert_array_equal(np.asarray(y)[lost], 0.0)


def test_groups_and_keys_pass_through():
    with pytest.raises(ValueError, match="sequences_per_group"):
        MoE(dataclasses.replace(CONFIG, sequences_per_group=3), rngs=nnx.Rngs(0))(X)
    noisy = MoE(dataclasses.replace(CONFIG, jitter=0.5), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="key"):
        noisy(X, train=True)
    first, again, other = (noisy(X, train=True, key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(noisy(X)[0], noisy(X, key=jax.random.key(1))[0])


def test_dtype_is_the_experts_only():
    full = MoE(CONFIG, rngs=nnx.Rngs(5))
    half = MoE(CONFIG, dtype="bfloat16", param_dtype="bfloat16", rngs=nnx.Rngs(5))
    assert half.router_DE[...].dtype == jnp.float32 and half.w_in_EDF[...].dtype == jnp.bfloat16
    x = X.astype(jnp.bfloat16).astype(jnp.float32)  # so that both routers read the same numbers
    y, _, trace = half.trace(x)
    want, _, want_trace = full.trace(x)
    assert y.dtype == jnp.float32 and trace.weight_SK.dtype == jnp.float32
    np.testing.assert_array_equal(trace.expert_SK, want_trace.expert_SK)
    np.testing.assert_allclose(trace.weight_SK, want_trace.weight_SK, atol=1e-6)
    np.testing.assert_allclose(y, want, atol=2e-2 * float(jnp.abs(want).max()))
    assert not np.array_equal(y, want)
