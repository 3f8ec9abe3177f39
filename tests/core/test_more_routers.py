"""Noisy top-k, soft gating and hash routing, and what all the routers beside the linear ones refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import switchmoe as sm
from switchmoe.routing import choose_by_hash as choose_by_hash_eagerly
from switchmoe.routing import choose_noisy_top_k as choose_noisy_top_k_eagerly
from switchmoe.routing import make_router
from switchmoe.routing.base import draw_noise
from switchmoe.routing.hash import _mix
from switchmoe.routing.noisy import NoisyRouterParams, smooth_load

from .worlds import assert_close_to_peak, assert_trees_close, make_x

KEY = jax.random.key(7)


def config_of(router, num_experts, **options):
    return sm.MoEConfig(**(dict(d_model=2, d_ff=2, num_experts=num_experts, router=router) | options))


route = jax.jit(sm.route, static_argnames="config")
choose_noisy_top_k = jax.jit(choose_noisy_top_k_eagerly, static_argnames="k")
choose_by_hash = jax.jit(choose_by_hash_eagerly, static_argnames=("num_experts", "k"))


@functools.partial(jax.jit, static_argnames=("config", "train"))
def apply(params, x_GTD, config, *, key=None, mask=None, token_ids=None, train=False):
    router = make_router(config)
    return router.apply(params, x_GTD, key=key, mask=mask, token_ids=token_ids, train=train)


def test_golden_noisy_top_k_without_noise():
    # exp(logits) = (6, 2, 1, 3): experts 0 and 3, 6 / 9 and 3 / 9, and nothing for the others.
    routing = route(jnp.log(jnp.array([[6.0, 2.0, 1.0, 3.0]])), config_of("noisy_top_k", 4, top_k=2))
    assert routing.expert_GTK.tolist() == [[0, 3]]
    np.testing.assert_allclose(routing.weight_GTK, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GTE, [[2 / 3, 0, 0, 1 / 3]], rtol=1e-6)
    assert routing.smooth_load_GTE is None


# Scores 4, 3, 1, 0 and k = 2. Without expert 0 the second best is 1, without expert 1 it is 1 as well,
# without expert 2 or 3 it is 3. So expert 0 is 3 / 1 deviations above, expert 1 is 2 / 2, expert 2 is 2 / 1
# below and expert 3 is 3 / (1/2) below.
SCORES = jnp.array([[4.0, 3.0, 1.0, 0.0]])
DEVIATIONS = jnp.array([[1.0, 2.0, 1.0, 0.5]])


def test_golden_smooth_load_and_its_gradient():
    routing = choose_noisy_top_k(SCORES, DEVIATIONS, k=2)
    np.testing.assert_allclose(
        routing.smooth_load_GTE, [[0.9986501, 0.8413447, 0.0227501, 9.866e-10]], rtol=2e-4
    )

    # Of expert 1's, Phi((h_1 - h_2) / s_1): phi(1) / s_1 to h_1, as much less to h_2, and -phi(1) to s_1.
    def of_expert_1(scores, deviations):
        return choose_noisy_top_k(scores, deviations, k=2).smooth_load_GTE[0, 1]

    by_score, by_deviation = jax.jit(jax.grad(of_expert_1, argnums=(0, 1)))(SCORES, DEVIATIONS)
    slope = norm.pdf(1) / 2
    assert_close_to_peak(by_score, [[0, slope, -slope, 0]])
    assert_close_to_peak(by_deviation, [[0, -slope, 0, 0]])


def test_smooth_load_of_everybody_and_of_a_noise_that_died_out():
    everybody = choose_noisy_top_k(SCORES, DEVIATIONS, k=4)
    np.testing.assert_array_equal(everybody.smooth_load_GTE, np.ones((1, 4)))
    slope = jax.grad(lambda d: choose_noisy_top_k(SCORES, d, k=2).smooth_load_GTE.sum())(jnp.zeros((1, 4)))
    assert bool(jnp.isfinite(slope).all())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_load_as_its_definition(k):
    # Ties among the noisy scores included: half of them are whole numbers.
    clean, noisy = make_x(1, 12, 5), make_x(2, 12, 5)
    noisy = noisy.at[::2].set(jnp.round(noisy[::2]))
    deviation = jnp.exp(make_x(3, 12, 5))
    load = jax.jit(smooth_load, static_argnums=3)(clean, noisy, deviation, k)
    for token, expert in np.ndindex(12, 5):
        others = np.delete(np.asarray(noisy[token]), expert)
        margin = float(clean[token, expert]) - np.sort(others)[-k]
        expected = norm.cdf(margin / float(deviation[token, expert]))
        assert float(load[token, expert]) == pytest.approx(expected, abs=1e-6)


def test_noise_has_its_deviation_and_the_smooth_load_is_the_load_to_expect():
    # The router is the identity, so the scores are x. W_noise makes 2, 0 and -1 of them: softplus of these.
    x_E = jnp.array([0.5, 0.2, 0.0])
    params = NoisyRouterParams(jnp.eye(3), jnp.outer(jnp.array([2.0, 0, 0]), jnp.array([2.0, 0.0, -1.0])))
    config = config_of("noisy_top_k", 3, top_k=2, d_model=3)
    x = jnp.broadcast_to(x_E, (1, 6000, 3))
    routing = apply(params, x, config, key=KEY, train=True)
    noise = np.asarray(routing.logits_GTE[0] - x_E)
    deviation = np.log1p(np.exp([2.0, 0.0, -1.0]))
    assert (np.abs(noise.mean(0)) < 4 * deviation / np.sqrt(6000)).all()
    np.testing.assert_allclose(noise.std(0), deviation, rtol=4 / np.sqrt(2 * 6000))
    load = np.asarray(jax.nn.one_hot(routing.expert_GTK[0], 3).sum(axis=(0, 1)))
    assert (np.abs(load - routing.smooth_load_GTE[0].sum(0)) < 4 * np.sqrt(6000) / 2).all()
    assert np.ptp(load) > 600  # so that an even load would not pass
    quiet = apply(params, x, config, key=KEY)
    np.testing.assert_array_equal(quiet.logits_GTE[0], x[0])
    assert float(quiet.smooth_load_GTE[0, 0, 0]) == pytest.approx(norm.cdf(0.5 / deviation[0]), rel=1e-5)


def test_noisy_starts_with_a_deviation_of_ln_2_and_learns_it():
    config = config_of("noisy_top_k", 5, top_k=2, d_model=4)
    params, x = make_router(config).init(jax.random.key(1)), make_x(4, 2, 6, 4)
    assert not params.noise_DE.any() and bool(params.router_DE.any())
    noise = apply(params, x, config, key=KEY, train=True).logits_GTE - apply(params, x, config).logits_GTE
    drawn = draw_noise(KEY, "noisy_top_k", noise.shape, jax.random.normal)
    assert_close_to_peak(noise, np.log(2) * drawn)

    def gradient(read):
        return jax.jit(jax.grad(lambda p: read(apply(p, x, config, key=KEY, train=True))))(params)

    for read in (
        lambda routing: jnp.sum(make_x(5, 2, 6, 2) * routing.weight_GTK),
        lambda routing: routing.smooth_load_GTE[..., 0].sum(),
    ):
        assert all(float(jnp.abs(leaf).max()) > 1e-2 for leaf in gradient(read))


def test_a_bias_moves_the_noisy_choice_and_not_its_weights():
    # p = (6, 2, 1, 3) / 12. With .5 more for expert 2 the choices are 2 (7/12) and 0 (6/12): 1 / 7 and 6 / 7.
    logits, config = jnp.log(jnp.array([[6.0, 2.0, 1.0, 3.0]])), config_of("noisy_top_k", 4, top_k=2)
    routing = route(logits, config, bias=jnp.array([0, 0, 0.5, 0]))
    assert routing.expert_GTK.tolist() == [[2, 0]]
    np.testing.assert_allclose(routing.weight_GTK, [[1 / 7, 6 / 7]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GTE, [[6 / 7, 0, 1 / 7, 0]], rtol=1e-6)


def test_noise_of_no_known_size_is_refused():
    with pytest.raises(ValueError, match="deviation_TE"):
        choose_noisy_top_k(SCORES, key=KEY)


def test_golden_soft_gating():
    # exp(logits) = (1, 4, 1, 2), together 8: expert 1, then 3, then 0 and 2 by index.
    routing = route(jnp.log(jnp.array([[1.0, 4.0, 1.0, 2.0]])), config_of("soft", 4, top_k=4))
    assert routing.expert_GTK.tolist() == [[1, 3, 0, 2]]
    np.testing.assert_allclose(routing.weight_GTK, [[1 / 2, 1 / 4, 1 / 8, 1 / 8]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GTE, [[1 / 8, 1 / 2, 1 / 8, 1 / 4]], rtol=1e-6)


def mix_in_python(value):
    """MurmurHash3's finalizer on whole numbers of any size, after the constant of this library."""
    value = (value + 0x9E3779B9) % 2**32
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) % 2**32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) % 2**32
    return value ^ (value >> 16)


def test_golden_hash():
    # The finalizer sends 1 to 0x514E28B7, which is also MurmurHash3's value of nothing with seed 1.
    assert int(_mix(jnp.uint32((1 - 0x9E3779B9) % 2**32))) == 0x514E28B7
    ids = [0, 1, 7, 50256, 2**31 - 1]
    routing = choose_by_hash(jnp.array(ids), num_experts=6, k=3)
    expected = [
        sorted(range(6), key=lambda expert: mix_in_python(mix_in_python(token) ^ expert))[:3] for token in ids
    ]
    assert routing.expert_GTK.tolist() == expected
    # Written down, since a trained model is worth nothing with another hash.
    assert expected[:3] == [[3, 1, 4], [5, 0, 2], [3, 4, 5]]
    np.testing.assert_allclose(routing.weight_GTK, np.full((5, 3), 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GTE[0].sum(), 1, rtol=1e-6)
    assert sorted(np.flatnonzero(routing.probs_GTE[0])) == sorted(expected[0])
    np.testing.assert_array_equal(jax.nn.logsumexp(routing.logits_GTE, axis=-1), np.zeros(5))
    assert bool(jnp.isfinite(routing.logits_GTE).all())


def test_hash_sends_as_many_ids_to_every_pair_of_experts():
    routing = choose_by_hash(jnp.arange(6000), num_experts=4, k=2)
    pairs, counts = np.unique(np.asarray(routing.expert_GTK), axis=0, return_counts=True)
    assert len(pairs) == 12  # every ordered pair of two different ones
    assert (np.abs(counts - 500) < 4 * np.sqrt(6000 * 1 / 12 * 11 / 12)).all()


def test_hash_reads_ids_and_nothing_else():
    config = config_of("hash", 4, top_k=2)
    router, ids = make_router(config), jnp.array([[3, 5, 3], [5, 3, 9]])
    assert router.init(KEY) == ()
    one = apply((), make_x(6, 2, 3, 2), config, token_ids=ids, key=KEY, train=True)
    other = apply((), make_x(7, 2, 3, 2), config, token_ids=ids)
    assert_trees_close(one, other, 0)
    expert = one.expert_GTK.tolist()
    assert expert[0][0] == expert[0][2] == expert[1][1] and expert[0][1] == expert[1][0]
    assert len({tuple(row) for group in expert for row in group}) > 1


SENTENCES = [
    (dict(router="noisy_top_k"), "top_k=1 makes every weight 1"),
    (dict(router="noisy_top_k", top_k=2, renormalize=True), "does not read renormalize"),
    (dict(router="expert_choice", dispatch="dropless"), "choose dispatch='gather'"),
    (dict(router="expert_choice", overflow="next"), "does not read overflow"),
    (dict(router="soft_moe", top_k=2), "top_k=2"),
    (dict(router="soft_moe", dispatch="dropless"), "choose dispatch='gather'"),
    (dict(router="soft_moe", expert_capacity=3), "expert_capacity=3"),
    (dict(router="soft_moe", jitter=0.1), "does not read jitter"),
    (dict(router="soft", top_k=2), "set top_k=3"),
    (dict(router="soft", top_k=3, overflow="next"), "does not read overflow"),
    (dict(router="sinkhorn", bias_step=1e-3), "does not read bias_step"),
    (dict(router="base", top_k=2), "set top_k=1"),
    (dict(router="base", load_coef=0.1), "does not read load_coef"),
    (dict(router="hash", jitter=0.1), "does not read jitter"),
    (dict(router="switch", slots_per_expert=2), "does not read slots_per_expert"),
]


@pytest.mark.parametrize(("options", "words"), SENTENCES, ids=str)
def test_settings_that_do_not_suit_a_router_are_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_router(config_of(num_experts=3, **options))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hash", "soft_moe"])
def test_routers_without_scores_for_experts_say_so(name):
    with pytest.raises(ValueError, match=f"router='{name}'.*choose_"):
        route(SCORES, config_of(name, 4))


def test_hash_without_ids_and_noise_without_a_key_are_refused():
    x = make_x(8, 1, 3, 2)
    with pytest.raises(ValueError, match="pass token_ids"):
        make_router(config_of("hash", 4)).apply((), x)
    router = make_router(config_of("noisy_top_k", 4, top_k=2))
    with pytest.raises(ValueError, match="needs a key"):
        router.apply(router.init(KEY), x, train=True)
