"""Expert choice and Soft MoE; and which routers let later tokens change what earlier ones get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.routing import (
    ExpertChoice,
    SoftMix,
    SoftRouterParams,
    make_router,
    score_slots,
)
from switchmoe.routing import choose_by_experts as choose_by_experts_eagerly
from switchmoe.routing import choose_soft_mix as choose_soft_mix_eagerly

from .test_more_routers import apply, config_of, route
from .worlds import assert_close_to_peak, assert_trees_close, make_x

KEY = jax.random.key(7)
choose_by_experts = jax.jit(choose_by_experts_eagerly, static_argnames="capacity")
choose_soft_mix = jax.jit(choose_soft_mix_eagerly)

# Four tokens' probabilities for three experts.
SHARES = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]])
LOGITS = jnp.asarray(np.log(SHARES), jnp.float32)


@pytest.mark.parametrize(
    ("mask", "capacity", "tokens", "weights"),
    [
        # Expert 0 sees .7 .1 .2 .5, expert 1 sees .2 .6 .2 .3, expert 2 sees .1 .3 .6 .2.
        ([1, 1, 1, 1], 2, [[0, 3], [1, 3], [2, 1]], [[0.7, 0.5], [0.6, 0.3], [0.6, 0.3]]),
        # Expert 1's third place is a tie of tokens 0 and 2.
        ([1, 1, 1, 1], 3, [[0, 3, 2], [1, 3, 0], [2, 1, 3]], [[0.7, 0.5, 0.2], *[[0.6, 0.3, 0.2]] * 2]),
        # Two real tokens for three seats: the third stays empty, token 4 with weight 0.
        ([0, 0, 1, 1], 3, [[3, 2, 4], [3, 2, 4], [2, 3, 4]], [[0.5, 0.2, 0], [0.3, 0.2, 0], [0.6, 0.2, 0]]),
        ([0, 0, 0, 0], 1, [[4], [4], [4]], [[0], [0], [0]]),
    ],
)  # fmt: skip
def test_golden_expert_choice(mask, capacity, tokens, weights):
    choice = choose_by_experts(LOGITS, capacity=capacity, mask=jnp.array(mask, bool))
    assert choice.token_GEC.tolist() == tokens
    np.testing.assert_allclose(choice.weight_GEC, weights, rtol=1e-6)
    np.testing.assert_allclose(choice.probs_GTE, SHARES, rtol=1e-6)


def test_experts_take_as_many_tokens_as_they_have_seats():
    # ceil(1.25 * 4 * 1 / 3) = 2 seats in training, ceil(2 * 4 / 3) = 3 in evaluation, and with top_k=2 all 4.
    params, x = jnp.eye(3), LOGITS[None]
    config, twice = (
        config_of("expert_choice", 3, d_model=3),
        config_of("expert_choice", 3, d_model=3, top_k=2),
    )
    assert apply(params, x, config, train=True).token_GEC.tolist() == [[[0, 3], [1, 3], [2, 1]]]
    assert apply(params, x, config).token_GEC.shape == (1, 3, 3)
    assert_trees_close(route(LOGITS, config), choose_by_experts(LOGITS, capacity=3))
    assert apply(params, x, twice).token_GEC.shape == (1, 3, 4)
    with pytest.raises(ValueError, match="capacity is 5"):
        choose_by_experts(LOGITS, capacity=5)


def test_real_tokens_are_taken_before_padding_however_unlikely():
    # Expert 1's probabilities are 0 for both real tokens, in float32 or altogether; 0 and 2 are padding.
    logits = jnp.array([[0.0, 0.0], [0.0, -200.0], [0.0, 0.0], [0.0, -jnp.inf]])
    choice = choose_by_experts(logits, capacity=3, mask=jnp.array([False, True, False, True]))
    assert choice.token_GEC.tolist() == [[1, 3, 4], [1, 3, 4]]


def test_gradient_of_expert_choice_is_that_of_the_probabilities():
    pull, capacity = make_x(1, 3, 2), 2
    token = choose_by_experts(LOGITS, capacity=capacity).token_GEC
    grad = jax.jit(
        jax.grad(lambda scores: jnp.sum(pull * choose_by_experts(scores, capacity=capacity).weight_GEC))
    )(LOGITS)
    # Each seat (e, c) of token t adds pull * p_e (1_j=e - p_j) to the slope of the token's score j.
    expected = np.zeros((4, 3))
    for e, c in np.ndindex(3, 2):
        p = SHARES[int(token[e, c])]
        expected[int(token[e, c])] += float(pull[e, c]) * p[e] * ((np.arange(3) == e) - p)
    assert_close_to_peak(grad, expected)


def test_golden_soft_mix():
    # Two experts of two seats. exp(logits) of token 0 are 1, 2 | 3, 4 and of token 1 they are 1, 0 | 1, 2.
    # The seats' shares of the tokens: (1/2, 1/2), (1, 0) | (3/4, 1/4), (2/3, 1/3). Token 0's shares of the
    # seats: 1, 2 | 3, 4 tenths; token 1's: 1, 0 | 1, 2 fourths.
    weights = np.array([[[1.0, 2], [3, 4]], [[1, 0], [1, 2]]])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(weights), jnp.float32)
    mix = choose_soft_mix(logits)
    np.testing.assert_allclose(mix.dispatch_GTEC[0], [[1 / 2, 1], [3 / 4, 2 / 3]], rtol=1e-6)
    np.testing.assert_allclose(mix.dispatch_GTEC[1], [[1 / 2, 0], [1 / 4, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(mix.combine_GTEC, weights / np.array([10, 4])[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(mix.logits_GTE), [[3, 7], [1, 3]], rtol=1e-6)
    np.testing.assert_allclose(mix.probs_GTE, [[0.3, 0.7], [0.25, 0.75]], rtol=1e-6)
    # Without token 0 every seat is token 1, and token 0 gets nothing.
    alone = choose_soft_mix(logits.at[1].add(1e-3), jnp.array([False, True]))
    np.testing.assert_allclose(alone.dispatch_GTEC[1, 1], [1, 1], rtol=1e-6)
    assert not alone.dispatch_GTEC[0].any() and not alone.combine_GTEC[0].any()


def test_golden_slot_scores():
    # Token (3, 4) is (.6, .8); slots (2, 0) and (0, -5) are (1, 0) and (0, -1); the scale is 10.
    params = SoftRouterParams(jnp.array([[[2.0, 0.0]], [[0.0, -5.0]]]), jnp.array([10.0]))
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(jax.jit(score_slots)(params, x), [[[6, -8]], [[0, 0]]], atol=1e-5)


def test_soft_mix_without_a_real_token_is_nothing_and_has_a_finite_slope():
    config = config_of("soft_moe", 3, d_model=4, slots_per_expert=2)
    params, x = make_router(config).init(KEY), make_x(2, 2, 5, 4).at[0].set(0.0)
    assert params.slot_DEC.shape == (4, 3, 2) and params.scale_1.tolist() == [1.0]
    mask = jnp.array([[False] * 5, [True] * 3 + [False] * 2])
    pulls = make_x(3, 2, 5, 3, 2), make_x(4, 2, 5, 3, 2)

    @jax.jit
    def gradient(params, x):
        def pulled(params, x):
            mix = make_router(config).apply(params, x, mask=mask)
            return jnp.sum(pulls[0] * mix.dispatch_GTEC + pulls[1] * mix.combine_GTEC), mix

        return jax.grad(pulled, argnums=(0, 1), has_aux=True)(params, x)

    (by_params, by_x), mix = gradient(params, x)
    assert not mix.dispatch_GTEC[0].any() and not mix.combine_GTEC[0].any()
    np.testing.assert_allclose(mix.dispatch_GTEC[1].sum(axis=0), np.ones((3, 2)), rtol=1e-5)
    np.testing.assert_allclose(mix.combine_GTEC[1].sum(axis=(1, 2)), [1, 1, 1, 0, 0], rtol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in by_params)
    assert not by_x[~mask].any() and bool(jnp.isfinite(by_x).all())
    assert bool((jnp.abs(by_x[1, :3]).max(-1) > 1e-3).all())


CASES = {
    "noisy_top_k": dict(top_k=2),
    "soft": dict(top_k=3),
    "hash": dict(top_k=2),
    "sinkhorn": dict(),
    "base": dict(),
    "expert_choice": dict(),
    "soft_moe": dict(slots_per_expert=2),
}
LEAKING = ["sinkhorn", "base", "expert_choice", "soft_moe"]


def what_tokens_get(decision):
    """For each token, in rows: its experts or seats, with their weights."""
    if isinstance(decision, SoftMix):
        return np.stack([decision.dispatch_GTEC[0], decision.combine_GTEC[0]], axis=1)
    if isinstance(decision, ExpertChoice):
        num_tokens, num_experts = decision.probs_GTE.shape[1:]
        table = np.zeros((num_tokens + 1, num_experts))
        table[np.asarray(decision.token_GEC[0]), np.arange(num_experts)[:, None]] = decision.weight_GEC[0]
        return table[:-1]
    return np.concatenate([decision.expert_GTK[0], decision.weight_GTK[0]], axis=-1)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_whether_later_tokens_change_what_earlier_ones_get(name, train):
    config = config_of(name, 3, d_model=4, init_scale=40.0, **CASES[name])
    router, x = make_router(config), make_x(10, 1, 12, 4)
    params, later = router.init(jax.random.key(2)), x.at[:, 8:].set(3 * make_x(11, 1, 4, 4))
    ids = jnp.arange(12)[None]

    def given(x, token_ids):
        return what_tokens_get(apply(params, x, config, key=KEY, token_ids=token_ids, train=train))

    one, other = given(x, ids), given(later, ids.at[:, 8:].add(12))
    assert (one[8:] != other[8:]).any()
    assert bool(router.leak) == (name in LEAKING)
    leaks = name in LEAKING and (train or not router.leak.startswith("in training"))
    assert (one[:8] != other[:8]).any() == leaks


@pytest.mark.parametrize("name", ["noisy_top_k", "soft", "hash", "sinkhorn", "base"])
def test_weights_of_given_experts_are_those_of_the_choice(name):
    config = config_of(name, 3, d_model=4, init_scale=40.0, **CASES[name])
    router, x = make_router(config), make_x(12, 1, 6, 4)
    params = router.init(jax.random.key(2))
    routing = apply(params, x, config, key=KEY, token_ids=jnp.arange(6)[None], train=True)
    weigh = jax.jit(functools.partial(router.weigh, routing.logits_GTE))
    assert_close_to_peak(weigh(routing.expert_GTK), routing.weight_GTK)
    assert not weigh(jnp.full_like(routing.expert_GTK, 3)).any()


@pytest.mark.parametrize("noise", ["jitter", "input_dropout"])
def test_noise_on_the_input_is_for_training_alone(noise):
    for name in ("expert_choice", "sinkhorn"):
        config = config_of(name, 3, d_model=4, **{noise: 0.5})
        params, x = jnp.ones((4, 3)), make_x(13, 1, 6, 4)
        quiet = apply(params, x, config, key=KEY)
        np.testing.assert_array_equal(quiet.logits_GTE, apply(params, x, config).logits_GTE)
        noisy = apply(params, x, config, key=KEY, train=True)
        assert float(jnp.abs(noisy.logits_GTE - quiet.logits_GTE).max()) > 1e-2
