"""Jitter and expert dropout: in training only, unbiased, tied to the group's and the expert's own index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe import experts
from switchmoe.execution import Shard

from .worlds import assert_close_to_peak, make_config, make_params, make_x, moe, moe_with_trace

KEY = jax.random.key(7)
apply_experts = jax.jit(experts.apply_experts, static_argnames=("activation", "dropout"))


@pytest.mark.parametrize("option", ["jitter", "expert_dropout"])
def test_noise_is_for_training_alone(option):
    # As many seats in training as in evaluation, so that only the noise can make a difference.
    sizes = dict(capacity_factor=2.0, eval_capacity_factor=2.0)
    noisy, plain = make_config(**sizes, **{option: 0.5}), make_config(**sizes)
    params, x = make_params(1), make_x(1, 2, 6, 4)
    quiet, _ = moe(params, x, plain)
    np.testing.assert_array_equal(moe(params, x, noisy)[0], quiet)
    np.testing.assert_array_equal(moe(params, x, noisy, key=KEY)[0], quiet)
    np.testing.assert_array_equal(moe(params, x, plain, train=True, key=KEY)[0], quiet)
    first, _ = moe(params, x, noisy, train=True, key=KEY)
    assert float(jnp.abs(first - quiet).max()) > 1e-2
    np.testing.assert_array_equal(moe(params, x, noisy, train=True, key=KEY)[0], first)
    assert float(jnp.abs(moe(params, x, noisy, train=True, key=jax.random.key(8))[0] - first).max()) > 1e-2
    with pytest.raises(ValueError, match=rf"{option}.*key"):
        moe(params, x, noisy, train=True)


def test_jitter_never_reaches_the_experts():
    # With one expert p is 1 whatever the router saw, so the output must be that without jitter.
    params, x = make_params(2, experts=1), make_x(2, 2, 6, 4)
    config = make_config(num_experts=1, jitter=0.9)
    noisy, aux = moe(params, x, config, train=True, key=KEY)
    quiet, quiet_aux = moe(params, x, config)
    np.testing.assert_array_equal(noisy, quiet)
    assert abs(float(aux.z_sum - quiet_aux.z_sum)) > 1e-3  # the router did see it


def test_jitter_multiplies_each_feature_by_uniform_noise():
    # d_model = 1 and x = 1 with router (1, 0): p / (1 - p) = exp(noise), so the top weight shows the noise
    # itself: log(w / (1 - w)) is in [1 - eps, 1 + eps], with mean 1 and variance eps**2 / 3.
    eps, tokens = 0.4, 4000
    config = sm.MoEConfig(d_model=1, d_ff=1, num_experts=2, jitter=eps)
    params = sm.MoEParams(jnp.array([[1.0, 0.0]]), sm.ExpertParams(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1))))
    _, _, trace = moe_with_trace(params, jnp.ones((1, tokens, 1)), config, train=True, key=KEY)
    weight = np.asarray(trace.weight_SK, np.float64).reshape(-1)
    noise = np.log(weight / (1 - weight))
    assert noise.min() > 1 - eps - 1e-5 and noise.max() < 1 + eps + 1e-5
    assert noise.min() < 1 - 0.99 * eps and noise.max() > 1 + 0.99 * eps
    assert abs(noise.mean() - 1) < 5 * eps / np.sqrt(3 * tokens)
    assert noise.var() == pytest.approx(eps**2 / 3, rel=0.05)
    assert len(np.unique(noise)) > 0.9 * tokens  # one draw a token, not one a group


@pytest.mark.parametrize("option", ["jitter", "expert_dropout"])
def test_noise_follows_the_groups_index_and_not_the_batch(option):
    # Rows 1 and 2 of three, told where they stand (first_group), meet the noise they met in the whole batch;
    # the same row at another index meets other noise.
    config = make_config(**{option: 0.5})
    params, row = make_params(3), make_x(3, 1, 6, 4)
    x = jnp.concatenate([row, row, row])
    y, _ = moe(params, x, config, train=True, key=KEY)
    assert float(jnp.abs(y[0] - y[1]).max()) > 1e-2 and float(jnp.abs(y[1] - y[2]).max()) > 1e-2
    tail, _ = moe(params, x[1:], config, train=True, key=KEY, shard=Shard(first_group=1))
    assert_close_to_peak(tail, y[1:])
    head, _ = moe(params, x[:2], config, train=True, key=KEY)
    assert_close_to_peak(head, y[:2])


@pytest.mark.parametrize("gated", [False, True])
def test_both_dispatches_meet_the_same_noise(gated):
    options = dict(top_k=2, jitter=0.3, expert_dropout=0.4, capacity_factor=0.8, gated=gated)
    params, x = make_params(4, gated=gated), make_x(4, 2, 6, 4)
    y, aux = moe(params, x, make_config(**options), train=True, key=KEY)
    other_y, other_aux = moe(params, x, make_config(**options, dispatch="einsum"), train=True, key=KEY)
    assert_close_to_peak(other_y, y)
    np.testing.assert_array_equal(other_aux.kept_E, aux.kept_E)


def test_expert_dropout_zeroes_or_scales_hidden_features():
    # Identity experts on ones: h = 1, so each output is a hidden feature: 0, or 1 / (1 - .25) = 4/3.
    d, dropout = 50, 0.25
    eye = jnp.broadcast_to(jnp.eye(d), (3, d, d))
    y = apply_experts(sm.ExpertParams(eye, eye), jnp.ones((3, 4, 20, d)), dropout=dropout, key=KEY)
    values, counts = np.unique(np.asarray(y).round(5), return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], rtol=1e-5)
    total = y.size
    assert abs(counts[0] - dropout * total) < 4 * np.sqrt(total * dropout * (1 - dropout))
    # No two experts, groups or seats share their noise.
    patterns = np.unique(np.asarray(y).reshape(-1, d) == 0, axis=0)
    assert len(patterns) == 3 * 4 * 20


def test_expert_dropout_follows_the_experts_index():
    # Experts 1 and 2 alone, told their index, drop what they drop among all three; so do groups 1 and 2.
    params, x = make_params(5).experts, make_x(5, 3, 3, 2, 4)

    def apply(chosen, groups):
        some = jax.tree.map(lambda leaf: leaf[chosen], params)
        return apply_experts(
            some,
            x[chosen][:, groups],
            dropout=0.5,
            key=KEY,
            expert_E=jnp.arange(3)[chosen],
            group_G=jnp.arange(3)[groups],
        )

    everything = apply(slice(None), slice(None))
    assert_close_to_peak(apply(slice(1, 3), slice(None)), everything[1:])
    assert_close_to_peak(apply(slice(1, 2), slice(1, 3)), everything[1:2, 1:])


def test_expert_dropout_preserves_the_mean():
    # The second product is linear in what is dropped, so the mean over keys is the layer without dropout.
    config = make_config(expert_dropout=0.4, capacity_factor=2.0, eval_capacity_factor=2.0, gated=True)
    params, x = make_params(6, gated=True), make_x(6, 1, 6, 4)
    draws = 3000
    keys = jax.random.split(KEY, draws)
    y_N = jax.jit(jax.vmap(lambda key: sm.moe(params, x, config, train=True, key=key)[0]))(keys)
    quiet, _ = moe(params, x, config)
    error = np.asarray(y_N).std(0) / np.sqrt(draws)
    np.testing.assert_array_less(np.abs(np.asarray(y_N.mean(0) - quiet)), 5 * error + 1e-6)
    assert float(jnp.abs(y_N[0] - quiet).max()) > 1e-2
