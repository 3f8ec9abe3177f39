"""nn.MoE is the functional layer with its weights in nnx.Params, and nothing more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.layer import init_moe, moe
from switchmoe.nn import BalanceBias, MoE
from switchmoe.routing import update_bias

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


NAMES = {
    ("top_k", 2): {"router_DE": (8, 4)},
    ("noisy_top_k", 2): {"router_DE": (8, 4), "noise_DE": (8, 4)},
    ("soft_moe", 1): {"slot_DEC": (8, 4, 3), "scale_1": (1,)},
    ("hash", 2): {},
}


@pytest.mark.parametrize("router, top_k", NAMES)
def test_a_router_s_weights_have_its_own_names(router, top_k):
    slots = {"slots_per_expert": 3} if router == "soft_moe" else {}
    config = dataclasses.replace(CONFIG, router=router, top_k=top_k, shared_experts=2, gated=True, **slots)
    module = nnx.eval_shape(lambda: MoE(config, param_dtype="bfloat16", rngs=nnx.Rngs(0)))
    found = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in names(module).items()}
    shapes = {"w_in_EDF": (4, 8, 12), "w_out_EFD": (4, 12, 8), "w_gate_EDF": (4, 8, 12)}
    # Two shared experts are one of twice the width.
    shapes |= {"shared_w_in_EDF": (1, 8, 24), "shared_w_out_EFD": (1, 24, 8), "shared_w_gate_EDF": (1, 8, 24)}
    want = {name: (shape, "bfloat16") for name, shape in shapes.items()}
    want |= {name: (shape, "float32") for name, shape in NAMES[router, top_k].items()}
    assert found == want
    params, functional = jax.eval_shape(
        lambda: (MoE(config, rngs=nnx.Rngs(0)).params(), init_moe(jax.random.key(0), config))
    )
    assert params == functional  # of the same types and shapes


def test_weights_that_have_no_names_are_refused(monkeypatch):
    plain = init_moe(jax.random.key(0), CONFIG)
    monkeypatch.setattr("switchmoe.nn.moe.init_moe", lambda *_, **__: plain._replace(router=[plain.router]))
    with pytest.raises(ValueError, match="router's weights are a list, but nn.MoE holds one array"):
        MoE(CONFIG, rngs=nnx.Rngs(0))


def test_shared_experts_and_token_ids_reach_the_function():
    config = dataclasses.replace(CONFIG, router="hash", shared_experts=1, dispatch="dropless")
    module = MoE(config, rngs=nnx.Rngs(5))
    ids = jnp.arange(64).reshape(4, 16)
    y, aux = module(X, token_ids=ids)
    np.testing.assert_array_equal(y, moe(module.params(), X, config, token_ids=ids)[0])
    assert float(aux.dropped) == 0
    with pytest.raises(ValueError, match="token_ids"):
        module(X)


def test_the_balance_bias_is_state_that_calls_read_and_no_optimizer_sees():
    config = dataclasses.replace(CONFIG, router="sigmoid", bias_step=0.25)
    module = MoE(config, rngs=nnx.Rngs(5))
    leaf = names(module)["bias_E"]
    assert type(leaf) is BalanceBias and leaf[...].dtype == jnp.float32
    np.testing.assert_array_equal(leaf[...], np.zeros(4))
    _, weights, rest = nnx.split(module, nnx.Param, ...)
    assert "bias_E" not in {path[-1] for path, _ in nnx.to_flat_state(weights)}
    assert [path[-1] for path, _ in nnx.to_flat_state(rest)] == ["bias_E"]
    gradient = nnx.grad(lambda module: module(X)[0].sum())(module)
    assert "bias_E" not in {path[-1] for path, _ in nnx.to_flat_state(gradient)}

    unbiased, aux = module(X)
    module.bias_E[...] = update_bias(module.bias_E[...], aux.load_E, config.bias_step)
    bias = np.asarray(module.bias_E[...])
    # One step up for an expert with less than the mean load of 32, one down for the others.
    np.testing.assert_array_equal(bias, 0.25 * np.sign(32 - np.asarray(aux.load_E)))
    biased = module(X)[0]
    np.testing.assert_array_equal(biased, moe(module.params(), X, config, bias=jnp.asarray(bias))[0])
    assert not np.array_equal(biased, unbiased)
    np.testing.assert_array_equal(module(X, bias=jnp.zeros(4))[0], unbiased)  # a given one comes first
    where = module.trace(X)[2].expert_SK
    assert not np.array_equal(where, module.trace(X, bias=jnp.zeros(4))[2].expert_SK)


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
