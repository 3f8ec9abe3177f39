"""The sums that losses are made of, and how a layer starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm

from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_params, make_x, moe, summarize

MASK = np.array([[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0], [1] * 6, [0, 1, 1, 1, 1, 1]], bool)


def test_sums_of_the_parts_are_the_sums_of_the_whole():
    # Over groups (each row alone) and over micro-batches (two rows each): what is summed may be cut anywhere.
    config = make_config(top_k=2, eval_capacity_factor=0.8)
    params, x = make_params(1), make_x(1, 4, 6, 4)
    _, whole = moe(params, x, config, mask=MASK)
    assert float(whole.dropped) > 0
    for size in (1, 2):
        parts = [moe(params, x[i : i + size], config, mask=MASK[i : i + size])[1] for i in range(0, 4, size)]
        total = parts[0]
        for part in parts[1:]:
            total = sm.add_aux(total, part)
        assert_trees_close(total, whole)
        assert_trees_close(summarize(total), summarize(whole))
    # The balance loss is of the sums and not the mean of the parts' losses (f and P averaged before the
    # product).
    losses = [
        float(summarize(moe(params, x[i : i + 1], config, mask=MASK[i : i + 1])[1])["balance_loss"])
        for i in range(4)
    ]
    assert abs(np.mean(losses) - float(summarize(whole)["balance_loss"])) > 1e-3


def test_summaries_by_hand():
    # One layer, 4 experts, 8 tokens, k = 1: loads (4, 3, 1, 0), seats for 3: kept (3, 3, 1, 0), 1 dropped.
    aux = sm.MoEAux(
        load_E=jnp.array([4.0, 3.0, 1.0, 0.0]),
        kept_E=jnp.array([3.0, 3.0, 1.0, 0.0]),
        prob_sum_E=jnp.array([4.0, 2.0, 1.0, 1.0]),
        z_sum=jnp.float32(24.0),
        entropy_sum=jnp.float32(6.0),
        top_prob_sum=jnp.float32(5.0),
        dropped=jnp.float32(1.0),
        expected_dropped=jnp.float32(0.5),
        tokens=jnp.float32(8.0),
        choices=jnp.float32(8.0),
        unserved=jnp.float32(2.0),
        smooth_load_E=jnp.array([4.0, 3.0, 1.0, 0.0]),
        sequence_balance_sum=jnp.float32(3.0),
        sequences=jnp.float32(2.0),
    )
    expected = {
        "balance_loss": 4 * (4 * 4 + 3 * 2 + 1 * 1) / 64,  # E * sum (load / 8) (prob_sum / 8) = 1.4375
        "z_loss": 3.0,
        "sequence_balance_loss": 1.5,
        "importance_loss": 0.375,  # (4, 2, 1, 1): mean 2, variance (4 + 0 + 1 + 1) / 4 = 1.5, over 2**2
        "load_loss": 0.625,  # (4, 3, 1, 0): mean 2, variance (4 + 1 + 1 + 4) / 4 = 2.5, over 2**2
        "unserved_fraction": 0.25,
        "dropped_fraction": 0.125,
        "dropped_floor": 0.0625,
        "max_vio": 1.0,  # the mean load is 2, the largest 4
        "router_entropy": 0.75,
        "top_prob": 0.625,
        "dead_experts": 1,
    }
    metrics = summarize(aux)
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    np.testing.assert_allclose(metrics["load_fraction"], [0.5, 0.375, 0.125, 0.0])
    # Stacked with a layer in perfect balance: the losses add over layers, the ratios are averaged, and the
    # dead are counted.
    even = aux._replace(
        load_E=jnp.full(4, 2.0),
        kept_E=jnp.full(4, 2.0),
        prob_sum_E=jnp.full(4, 2.0),
        dropped=jnp.float32(0.0),
        z_sum=jnp.float32(8.0),
        entropy_sum=jnp.float32(2.0),
        top_prob_sum=jnp.float32(8.0),
        unserved=jnp.float32(0.0),
        smooth_load_E=jnp.full(4, 2.0),
        sequence_balance_sum=jnp.float32(2.0),
    )
    metrics = summarize(jax.tree.map(lambda a, b: jnp.stack([a, b]), aux, even))
    expected = {
        "balance_loss": 2.4375,
        "z_loss": 4.0,
        "sequence_balance_loss": 2.5,
        "importance_loss": 0.375,
        "load_loss": 0.625,
        "unserved_fraction": 0.125,
        "dropped_fraction": 0.0625,
        "dropped_floor": 0.0625,
        "max_vio": 0.5,
        "router_entropy": 0.5,
        "top_prob": 0.8125,
        "dead_experts": 1,
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    assert metrics["load_fraction"].shape == (2, 4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_have_their_shapes_and_are_float32(dtype):
    _, aux = moe(make_params(2), make_x(2, 2, 6, 4).astype(dtype), make_config(top_k=2))
    assert {leaf.dtype for leaf in aux} == {jnp.dtype("float32")}
    shapes = {name: leaf.shape for name, leaf in aux._asdict().items()}
    assert shapes == {name: ((3,) if name.endswith("_E") else ()) for name in aux._fields}
    assert float(aux.load_E.sum()) == float(aux.choices) == 24 and float(aux.tokens) == 12
    assert float(aux.kept_E.sum() + aux.dropped) == 24
    assert float(aux.prob_sum_E.sum()) == pytest.approx(12, rel=1e-5)


def test_only_the_losses_carry_a_gradient():
    params, x, config = make_params(3), make_x(3, 2, 6, 4), make_config(top_k=2)

    @jax.jit
    def all_gradients(params):
        names = [name for name in summarize(moe(params, x, config)[1]) if name not in ("dead_experts",)]
        return {
            name: jax.grad(lambda p, name=name: summarize(moe(p, x, config)[1])[name].sum())(params).router
            for name in names
        }

    # The load loss has one with noisy top-k alone: other routers' load is a count.
    with_gradient = {"balance_loss", "sequence_balance_loss", "importance_loss", "z_loss"}
    for name, gradient in all_gradients(params).items():
        assert bool(jnp.abs(gradient).max() > 1e-4) == (name in with_gradient), name


@pytest.mark.parametrize("gated", [False, True])
def test_initialisation(gated):
    # Switch: truncated normal, sigma = sqrt(s / fan_in), s = 0.1, cut at two sigma. The cut shrinks the
    # deviation to .8796 of the normal's; switchmoe documents that it makes up for it, so the bound is 2 /
    # .8796 = 2.274.
    config = sm.MoEConfig(d_model=64, d_ff=256, num_experts=4, gated=gated)
    params = sm.init_moe(jax.random.key(5), config)
    assert params.router.shape == (64, 4) and (params.experts.w_gate_EDF is not None) == gated
    assert params.experts.w_in_EDF.shape == (4, 64, 256) and params.experts.w_out_EFD.shape == (4, 256, 64)
    for leaf, fan_in in zip(jax.tree.leaves(params), (64, 64, 256, 64), strict=False):
        sigma = np.sqrt(0.1 / fan_in)
        values = np.asarray(leaf, np.float64).reshape(-1)
        # Three deviations of the estimate of sigma and of the mean (the tails are short: kurtosis below 3).
        assert values.std() == pytest.approx(sigma, rel=3 / np.sqrt(2 * values.size))
        assert abs(values.mean()) < 3 * sigma / np.sqrt(values.size)
        assert np.abs(values).max() < 2.28 * sigma
    for leaf in (
        params.experts.w_in_EDF,
        params.experts.w_out_EFD,
    ):  # fan-in is one expert's, not all experts'
        per_expert = np.asarray(leaf).std(axis=(1, 2))
        np.testing.assert_allclose(per_expert, np.asarray(leaf).std(), rtol=0.05)


def test_initialisation_follows_names_scale_and_dtype():
    sizes = dict(d_model=8, d_ff=16, num_experts=4)
    key = jax.random.key(6)
    plain = sm.init_moe(key, sm.MoEConfig(**sizes))
    gated = sm.init_moe(key, sm.MoEConfig(**sizes, gated=True))
    # Adding a weight does not shift the others, and no two weights are drawn from one key.
    assert_trees_close(gated._replace(experts=gated.experts._replace(w_gate_EDF=None)), plain, 0)
    assert float(jnp.abs(gated.experts.w_gate_EDF - gated.experts.w_in_EDF).max()) > 1e-2
    # s = 0.4 doubles what s = 0.1 draws.
    scaled = sm.init_moe(key, sm.MoEConfig(**sizes, init_scale=0.4))
    for wide, narrow in zip(jax.tree.leaves(scaled), jax.tree.leaves(plain), strict=True):
        assert_close_to_peak(wide, 2 * narrow)
    # The router is float32 whatever the experts are.
    half = sm.init_moe(key, sm.MoEConfig(**sizes), dtype=jnp.bfloat16)
    assert half.router.dtype == jnp.float32 and half.experts.w_in_EDF.dtype == jnp.bfloat16
    other = sm.init_moe(jax.random.key(7), sm.MoEConfig(**sizes))
    assert all(
        float(jnp.abs(a - b).max()) > 0 for a, b in zip(*map(jax.tree.leaves, (plain, other)), strict=True)
    )


def test_gradient_reaches_the_router_at_k_1():
    # y = p * expert(x): unlike a renormalised weight, p knows the router.
    params, x = make_params(8), make_x(8, 2, 6, 4)
    grads = jax.jit(jax.grad(lambda params: moe(params, x, make_config())[0].sum()))(params)
    assert float(jnp.abs(grads.router).max()) > 1e-2
