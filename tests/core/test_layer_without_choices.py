"""Layers whose tokens do not choose: experts that choose tokens, and seats that mix them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.seats import capacity

from . import oracle
from .test_layer_parts import MASK, ffn, init
from .worlds import assert_close_to_peak, make_config, make_x, moe_with_trace, summarize


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_layer_of_experts_that_choose(dispatch):
    # y_t = sum over experts e that chose t of p(e | t) FFN_e(x_t); who is chosen by nobody gets 0.
    config = make_config(router="expert_choice", dispatch=dispatch, eval_capacity_factor=0.9, init_scale=40.0)
    params, x = init(config), make_x(6, 2, 6, 4)
    y, aux, trace = moe_with_trace(params, x, config, mask=MASK)
    seats = capacity(6, 3, 1, 0.9)
    expected, sits = np.zeros(x.shape), np.zeros((2, 6, 3), bool)
    weight = np.zeros((2, 6, 3))
    for g in range(2):
        logits = np.asarray(x[g], np.float64) @ np.asarray(params.router, np.float64)
        probs = np.array([oracle.softmax(row) for row in logits])
        for e in range(3):
            for t in [t for t in oracle.best(probs[:, e], 6) if MASK[g, t]][:seats]:
                sits[g, t, e], weight[g, t, e] = True, probs[t, e]
                expected[g, t] += probs[t, e] * ffn(params.experts, e, x[g, t], config)
    assert_close_to_peak(y, expected)
    np.testing.assert_array_equal(trace.kept_SK, sits)
    np.testing.assert_array_equal(trace.expert_SK, np.where(sits, np.arange(3), 3))
    assert_close_to_peak(trace.weight_SK, weight)
    unserved = MASK & ~sits.any(-1)
    assert unserved.any() and not np.asarray(y)[unserved].any()
    for load in (aux.load_E, aux.kept_E):  # every expert is full: two groups of `seats`
        np.testing.assert_array_equal(load, [2.0 * seats] * 3)
    assert (float(aux.tokens), float(aux.choices), float(aux.dropped)) == (9, 6 * seats, 0)
    assert float(aux.unserved) == unserved.sum()
    metrics = summarize(aux)
    assert float(metrics["unserved_fraction"]) == pytest.approx(unserved.sum() / 9)
    assert float(metrics["max_vio"]) == float(metrics["dropped_fraction"]) == 0


def test_layer_of_seats_that_mix():
    # Seat (e, c) holds sum_t D x_t with D a softmax over tokens, y_t = sum_ec C FFN_e(seat) with C one over
    # seats, both of scale * cos(x_t, slot_ec).
    config = make_config(router="soft_moe", slots_per_expert=2)
    params, x = init(config), make_x(7, 2, 6, 4)
    params = params._replace(router=params.router._replace(scale_1=jnp.array([3.0])))
    y, aux, trace = moe_with_trace(params, x, config, mask=MASK)
    slots = np.asarray(params.router.slot_DEC, np.float64).reshape(4, 6)
    slots /= np.linalg.norm(slots, axis=0)
    expected, share = np.zeros(x.shape), np.zeros((2, 6, 3))
    for g in range(2):
        rows = np.flatnonzero(MASK[g])
        real = np.asarray(x[g], np.float64)[rows]
        scores = 3.0 * (real / np.linalg.norm(real, axis=1, keepdims=True)) @ slots
        dispatch = np.array([oracle.softmax(column) for column in scores.T])
        combine = np.array([oracle.softmax(row) for row in scores])
        out = np.array(
            [ffn(params.experts, s // 2, mixed, config) for s, mixed in enumerate(dispatch @ real)]
        )
        expected[g, rows] = combine @ out
        share[g, rows] = combine.reshape(-1, 3, 2).sum(-1)
    assert_close_to_peak(y, expected)
    np.testing.assert_array_equal(np.asarray(y)[~MASK], 0)
    assert_close_to_peak(trace.weight_SK, share)
    np.testing.assert_array_equal(trace.kept_SK, np.repeat(MASK[..., None], 3, -1))
    # A token's one choice is shared out, so the load adds up to the tokens; nothing is dropped or unserved.
    assert_close_to_peak(aux.load_E, share.sum((0, 1)))
    assert_close_to_peak(aux.prob_sum_E, share.sum((0, 1)))
    assert float(aux.choices) == pytest.approx(9) and float(aux.tokens) == 9
    assert float(aux.dropped) == float(aux.unserved) == 0


@pytest.mark.parametrize("router", ["expert_choice", "soft_moe"])
def test_their_gradient_is_the_slope(router):
    # Along random directions, central differences of the layer itself (float32, wide step).
    config = make_config(router=router, eval_capacity_factor=1.0)
    params, x = init(config), make_x(8, 1, 6, 4)
    pull = np.cos(np.arange(24.0)).reshape(1, 6, 4)

    @jax.jit
    def scalar(params, x):
        return jnp.sum(pull * sm.moe(params, x, config)[0])

    leaves, treedef = jax.tree.flatten((params, x))
    grads = jax.tree.leaves(jax.jit(jax.grad(scalar, argnums=(0, 1)))(params, x))
    rng = np.random.default_rng(9)
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        direction = rng.standard_normal(leaf.shape)
        direction /= np.linalg.norm(direction)

        def along(step, i=i, leaf=leaf, direction=direction):
            moved = [*leaves[:i], jnp.asarray(leaf + step * direction, jnp.float32), *leaves[i + 1 :]]
            return float(scalar(*jax.tree.unflatten(treedef, moved)))

        step = 1e-2 * float(jnp.abs(leaf).max())
        slope = (along(step) - along(-step)) / (2 * step)
        assert abs(slope - float((np.asarray(grad) * direction).sum())) < 5e-3 * np.linalg.norm(grad) + 1e-5
