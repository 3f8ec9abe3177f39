"""Golden cases of the routers with one weight [D, E]; the working stands beside each number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.routing import choose_sigmoid, choose_top_k

from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_params, make_x, moe


def config_of(router, num_experts, **options):
    return sm.MoEConfig(d_model=2, d_ff=2, num_experts=num_experts, router=router, **options)


def test_golden_softmax_after_the_choice():
    # exp(logits) = (6, 2, 1, 3): experts 0 and 3, with weights 6 / 9 and 3 / 9. Over all of them p is (6, 2,
    # 1, 3) / 12.
    logits = jnp.log(jnp.array([[6.0, 2.0, 1.0, 3.0]]))
    routing = sm.route(logits, config_of("top_k_then_softmax", 4, top_k=2))
    assert routing.expert_GTK.tolist() == [[0, 3]]
    np.testing.assert_allclose(routing.weight_GTK, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GTE, [[1 / 2, 1 / 6, 1 / 12, 1 / 4]], rtol=1e-6)


def test_softmax_after_the_choice_is_the_renormalised_one_before():
    logits, pull = make_x(1, 5, 6), make_x(2, 5, 3)

    def weights(router, **options):
        config = config_of(router, 6, top_k=3, **options)
        return jax.value_and_grad(lambda logits: jnp.sum(pull * sm.route(logits, config).weight_GTK))(logits)

    assert_trees_close(weights("top_k_then_softmax"), weights("top_k", renormalize=True))


# exp(logits) = (4, 3, 1, 1/4), so the scores s = exp / (1 + exp) are (.8, .75, .5, .2), together 2.25.
SIGMOID_LOGITS = jnp.log(jnp.array([[4.0, 3.0, 1.0, 0.25]]))
SIGMOID_BIAS = jnp.array([-0.1, 0.0, 0.3, 0.0])


def test_golden_sigmoid_with_a_bias():
    # With the bias the scores are (.7, .75, .8, .2): experts 2 and 1. Their weights are those without it, .5
    # and .75; over their sum 1.25, .4 and .6; times 2.5, 1 and 1.5.
    plain = sm.route(SIGMOID_LOGITS, config_of("sigmoid", 4, top_k=2), bias=SIGMOID_BIAS)
    assert plain.expert_GTK.tolist() == [[2, 1]]
    np.testing.assert_allclose(plain.weight_GTK, [[0.5, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(plain.probs_GTE, [[0.8 / 2.25, 1 / 3, 0.5 / 2.25, 0.2 / 2.25]], rtol=1e-6)
    config = config_of("sigmoid", 4, top_k=2, renormalize=True, weight_scale=2.5)
    scaled = sm.route(SIGMOID_LOGITS, config, bias=SIGMOID_BIAS)
    assert scaled.expert_GTK.tolist() == [[2, 1]]
    np.testing.assert_allclose(scaled.weight_GTK, [[1.0, 1.5]], rtol=1e-6)
    assert sm.route(SIGMOID_LOGITS, config).expert_GTK.tolist() == [[0, 1]]  # without a bias


def test_sigmoid_scores_too_small_for_float32_still_divide():
    # exp(-200) is 0 in float32; four equal ones are a quarter each, and half each of two.
    routing = choose_sigmoid(jnp.full((1, 4), -200.0), k=2, renormalize=True)
    np.testing.assert_allclose(routing.weight_GTK, [[0.5, 0.5]])
    np.testing.assert_allclose(routing.probs_GTE, [[0.25] * 4])


# Scores of eight experts in four groups of two, and the logits they come from.
GROUP_SCORES = np.array([[0.8, 0.2, 0.6, 0.5, 0.75, 0.3, 0.4, 0.4]])
GROUP_LOGITS = jnp.asarray(np.log(GROUP_SCORES / (1 - GROUP_SCORES)), jnp.float32)


@pytest.mark.parametrize(
    ("bias", "experts"),
    [
        # The groups are worth 1.0, 1.1, 1.05, .8: the second and the third are open. In them the best are
        # expert 4 (.75), 2 (.6) and 3 (.5); expert 0, the best of all, stands in a closed group.
        ([0.0] * 8, [4, 2, 3]),
        # With .2 more for expert 1 the first group is worth 1.2 and the third is closed: .8, .6, .5.
        ([0, 0.2, 0, 0, 0, 0, 0, 0], [0, 2, 3]),
        # One less for everybody changes nothing, though every score is negative then.
        ([-1.0] * 8, [4, 2, 3]),
    ],
)
def test_golden_group_limited_choice(bias, experts):
    config = config_of("sigmoid", 8, top_k=3, expert_groups=4, groups_per_token=2)
    routing = sm.route(GROUP_LOGITS, config, bias=jnp.asarray(bias, jnp.float32))
    assert routing.expert_GTK.tolist() == [experts]
    np.testing.assert_allclose(routing.weight_GTK[0], GROUP_SCORES[0, experts], rtol=1e-5)


def test_a_group_is_worth_its_two_best_experts():
    # (.5, .4, .4, .4) against (.6, .35, .1, .1): .9 against .95 by the two best, 1.7 against 1.15 by all of
    # them, and a group of one expert is worth that expert.
    scores = np.array([[0.5, 0.4, 0.4, 0.4, 0.6, 0.35, 0.1, 0.1]])
    logits = jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)
    assert choose_sigmoid(logits, k=2, expert_groups=2).expert_GTK.tolist() == [[4, 5]]
    alone = choose_sigmoid(logits, k=2, expert_groups=8, groups_per_token=2)
    assert alone.expert_GTK.tolist() == [[4, 0]]


def test_golden_bias_update():
    # Loads 4, 2, 0 with mean 2: the first expert gets harder to choose, the last easier, the second stays.
    bias = jnp.array([0.5, 0.0, -0.5])
    np.testing.assert_allclose(sm.update_bias(bias, jnp.array([4.0, 2.0, 0.0])), [0.499, 0.0, -0.499])
    layers = sm.update_bias(jnp.zeros((2, 3)), jnp.array([[1.0, 1.0, 4.0], [0.0, 0.0, 0.0]]), step=0.1)
    np.testing.assert_allclose(layers, [[0.1, 0.1, -0.1], [0, 0, 0]], rtol=1e-6)


def test_bias_updates_even_out_a_lopsided_router():
    # Expert 0's score is ahead by about two deviations, so it takes most of 256 tokens; at a step of .01 a
    # bias of order 1 is there after some hundred updates.
    logits = 0.5 * make_x(3, 256, 4) + jnp.array([1.0, 0.0, 0.0, -0.5])

    def update(bias, _):
        load = jax.nn.one_hot(choose_sigmoid(logits, bias=bias).expert_GTK, 4).sum(axis=(0, 1))
        return sm.update_bias(bias, load, step=0.01), load

    _, loads = jax.jit(lambda: jax.lax.scan(update, jnp.zeros(4), length=200))()
    max_vio = np.asarray(loads).max(-1) / 64 - 1
    assert max_vio[0] > 1.5 and max_vio[-20:].mean() < 0.15


def test_sums_read_the_routers_own_probabilities():
    # One token of logits ln (4, 3, 1, 1/4): probabilities s / 2.25, whose entropy is not that of a softmax.
    config = sm.MoEConfig(d_model=4, d_ff=5, num_experts=4, router="sigmoid")
    params = make_params(1, experts=4)._replace(router=jnp.diag(SIGMOID_LOGITS[0]))
    _, aux = moe(params, jnp.ones((1, 1, 4)), config)
    p = np.array([0.8, 0.75, 0.5, 0.2]) / 2.25
    assert_close_to_peak(aux.prob_sum_E, p)
    assert float(aux.entropy_sum) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert float(aux.top_prob_sum) == pytest.approx(0.8 / 2.25, rel=1e-5)
    assert float(aux.z_sum) == pytest.approx(np.log(8.25) ** 2, rel=1e-5)


def test_an_impossible_expert_has_no_entropy_and_a_finite_slope():
    params, x = make_params(2), jnp.full((1, 2, 4), 100.0)
    config = make_config()

    def entropy(params):
        return sm.moe(params, x, config)[1].entropy_sum

    value, slope = jax.jit(jax.value_and_grad(entropy))(params)
    assert float(value) == pytest.approx(0, abs=1e-6)
    assert bool(jnp.isfinite(slope.router).all())


def test_golden_balanced():
    # k = 2 of 3 experts: cards 0 1 | 2 0 | 1 2 | 0 1. Padding is dealt nothing: the third token is next.
    config = config_of("balanced", 3, top_k=2)
    logits = make_x(4, 4, 3)
    routing = sm.route(logits, config)
    assert routing.expert_GTK.tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert routing.weight_GTK.tolist() == [[0.5, 0.5]] * 4
    mask = jnp.array([True, False, True, True])
    masked = sm.route(logits, config, mask=mask)
    assert masked.expert_GTK[mask].tolist() == [[0, 1], [2, 0], [1, 2]]
    np.testing.assert_allclose(routing.probs_GTE, choose_top_k(logits).probs_GTE)
