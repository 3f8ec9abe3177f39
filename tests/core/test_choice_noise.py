"""Routers that draw: how often, from which key, when; and what a choice left unused does not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.dispatching import expected_drop
from switchmoe.dispatching.sums import sum_routing
from switchmoe.execution import Shard
from switchmoe.routing import make_router
from tests.checks import unchecked

from .test_golden import GATES
from .worlds import (
    assert_close_to_peak,
    assign_slots,
    make_config,
    make_params,
    make_routing,
    make_x,
    moe,
    moe_with_trace,
    seats_of,
)

KEY = jax.random.key(7)
NOISY = {
    "sample": dict(exploration="sample"),
    "sample two": dict(router="top_k", top_k=2, exploration="sample"),
    "input dropout": dict(input_dropout=0.5),
    "gshard": dict(router="gshard", top_k=2),
    "random": dict(router="random", top_k=2),
}
noisy = pytest.mark.parametrize("options", NOISY.values(), ids=NOISY)


@functools.partial(jax.jit, static_argnames=("config",))
def draw(logits_E, config, key=KEY):
    """The decisions on 6,000 tokens of one group with the same scores."""
    size = len(logits_E)
    x = jnp.broadcast_to(logits_E, (1, 6000, size))
    return make_router(config).apply(jnp.eye(size), x, key=key, train=True)


def assert_frequencies(experts_TK, expected):
    """Each row of experts as often as expected, within four deviations; nothing else."""
    rows, counts = np.unique(np.asarray(experts_TK), axis=0, return_counts=True)
    found = {tuple(int(e) for e in row): n for row, n in zip(rows, counts, strict=True)}
    total = sum(found.values())
    assert set(found) == set(expected)
    for row, p in expected.items():
        assert abs(found[row] - p * total) < 4 * np.sqrt(total * p * (1 - p)) + 1e-9, (row, found[row], p)


def draw_config(num_experts=3, **options):
    return sm.MoEConfig(d_model=num_experts, d_ff=2, num_experts=num_experts, **options)


LOGITS = jnp.log(jnp.array([5.0, 3.0, 2.0]))  # probabilities .5, .3, .2


def test_golden_sampling():
    routing = draw(LOGITS, draw_config(exploration="sample"))
    assert_frequencies(routing.expert_GTK[0], {(0,): 0.5, (1,): 0.3, (2,): 0.2})
    np.testing.assert_allclose(
        routing.weight_GTK[0, :, 0], np.array([0.5, 0.3, 0.2])[routing.expert_GTK[0, :, 0]]
    )


def test_golden_sampling_of_two():
    # First i with p_i, then j with p_j / (1 - p_i): .5 * .3 / .5, .5 * .2 / .5, .3 * .5 / .7, and so on.
    routing = draw(LOGITS, draw_config(router="top_k", top_k=2, exploration="sample"))
    p = [0.5, 0.3, 0.2]
    pairs = {(i, j): p[i] * p[j] / (1 - p[i]) for i in range(3) for j in range(3) if i != j}
    assert_frequencies(routing.expert_GTK[0], pairs)
    np.testing.assert_allclose(routing.weight_GTK, np.array(p)[routing.expert_GTK], rtol=1e-5)


def test_golden_input_dropout():
    # The router is the identity and x = (ln 3, 0): at a rate of 1/4 the first logit is 0 for a quarter of the
    # tokens, and ln 3 / (3/4) for the others.
    routing = draw(jnp.array([np.log(3.0), 0.0]), draw_config(2, input_dropout=0.25))
    logits = np.asarray(routing.logits_GTE[0, :, 0], np.float64)
    grown = np.isclose(logits, np.log(3.0) / 0.75, rtol=1e-5)
    assert (grown | (logits == 0)).all()
    assert abs(grown.sum() - 4500) < 4 * np.sqrt(6000 * 0.25 * 0.75)


def test_golden_gshard():
    # p = (.6, .3, .1): weights .6 / .9 and .3 / .9; the second is used with probability 2 * 1/3.
    logits = jnp.log(jnp.array([6.0, 3.0, 1.0]))
    config = draw_config(router="gshard", top_k=2)
    routing = draw(logits, config)
    assert_frequencies(routing.expert_GTK[0], {(0, 1): 2 / 3, (0, 3): 1 / 3})
    used = np.asarray(routing.expert_GTK[0, :, 1]) == 1
    np.testing.assert_allclose(routing.weight_GTK[0, :, 0], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(routing.weight_GTK[0, :, 1], used / 3, rtol=1e-6)
    assert sm.route(logits[None], config).expert_GTK.tolist() == [[0, 1]]  # always, in evaluation
    even = draw(jnp.array([0.0, 0.0, -30.0]), config)  # 2 * 1/2 is certain
    assert_frequencies(even.expert_GTK[0], {(0, 1): 1.0})


def test_golden_random():
    routing = draw(LOGITS, draw_config(router="random", top_k=2))
    assert_frequencies(routing.expert_GTK[0], {(i, j): 1 / 6 for i in range(3) for j in range(3) if i != j})
    assert (np.asarray(routing.weight_GTK) == 0.5).all()


def test_a_choice_left_unused_takes_no_seat():
    # Choice order, two seats, token 0's second choice unused. First choices: t0 -> 0 place 0, t1 -> 0 place
    # 1, t2 -> 2 place 0. Second ones: t1 -> 2 place 1, the seat t0 would have had; t2 -> 0 place 2 (dropped).
    routing = make_routing(GATES, 2)
    routing = routing._replace(expert_GTK=routing.expert_GTK.at[0, 1].set(3))
    plan = assign_slots(routing, capacity=2)
    assert seats_of(plan) == {(0, 0): 0, (0, 1): 1, (2, 0): 2, (2, 1): 1}
    np.testing.assert_array_equal(plan.kept_GTK, [[True, False], [True, True], [True, False]])
    # Five choices: expert 0 three, expert 2 two; one is dropped, and it is not token 0's. By chance as many
    # as two and a half tokens with two choices each would lose.
    whole = jax.tree.map(lambda leaf: leaf[None], (routing, plan))
    aux = sum_routing(*whole)
    assert aux.load_E.tolist() == [3, 0, 2] and aux.kept_E.tolist() == [2, 0, 2]
    assert (float(aux.tokens), float(aux.choices), float(aux.dropped)) == (3, 5, 1)
    floor = (expected_drop(2, 3, 2, 2) + expected_drop(3, 3, 2, 2)) / 2
    assert float(aux.expected_dropped) == pytest.approx(floor, rel=1e-5) and floor > 0.1


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_gshards_layer_adds_up_the_experts_that_are_used(dispatch):
    config = make_config(router="gshard", top_k=2, expert_capacity=12, dispatch=dispatch)
    params, x = make_params(4), make_x(4, 2, 12, 4)
    y, aux, trace = moe_with_trace(params, x, config, train=True, key=KEY)
    experts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.experts)
    expected, used = np.zeros(x.shape), 0
    for at in np.ndindex(2, 12, 2):
        expert, token = int(trace.expert_SK[at]), at[:2]
        if expert < 3:
            used += 1
            hidden = np.maximum(np.asarray(x[token], np.float64) @ experts.w_in_EDF[expert], 0)
            expected[token] += float(trace.weight_SK[at]) * (hidden @ experts.w_out_EFD[expert])
    assert 24 < used < 48
    assert_close_to_peak(y, expected)
    assert float(aux.choices) == float(aux.load_E.sum()) == float(aux.kept_E.sum()) == used
    assert float(aux.dropped) == 0 and int(np.asarray(trace.kept_SK).sum()) == used
    grads = jax.jit(jax.grad(lambda p: sm.moe(p, x, config, train=True, key=KEY)[0].sum()))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert float(jnp.abs(grads.router).max()) > 1e-2


@noisy
def test_the_draw_is_for_training_and_follows_key_and_group(options):
    config = make_config(**options, capacity_factor=2.0, eval_capacity_factor=2.0)
    params, row = make_params(3, router_scale=0.3), make_x(3, 1, 6, 4)  # unsure, so that noise decides
    x = jnp.concatenate([row, row, row])
    y, _ = moe(params, x, config, train=True, key=KEY)
    assert float(jnp.abs(moe(params, x, config)[0] - y).max()) > 1e-2
    assert float(jnp.abs(moe(params, x, config, train=True, key=jax.random.key(8))[0] - y).max()) > 1e-2
    if options.get("router") != "random":
        quiet = moe(params, x, config)[0]
        np.testing.assert_array_equal(moe(params, x, config, key=KEY)[0], quiet)
        np.testing.assert_array_equal(quiet[0], quiet[1])
    # The same row meets other noise in another group, and the same noise wherever that group is computed.
    assert float(jnp.abs(y[0] - y[1]).max()) > 1e-2 and float(jnp.abs(y[1] - y[2]).max()) > 1e-2
    tail, _ = moe(params, x[1:], config, train=True, key=KEY, shard=Shard(first_group=1))
    assert_close_to_peak(tail, y[1:])


@noisy
def test_the_draw_needs_a_key(options):
    config = make_config(**options)
    with unchecked(), pytest.raises(ValueError, match=r"needs a key") as caught:
        jax.eval_shape(lambda x: sm.moe(make_params(0), x, config, train=True), make_x(0, 2, 6, 4))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_random_without_a_key_evaluates_the_same_twice():
    config, params, x = make_config(router="random", top_k=2), make_params(5), make_x(5, 2, 6, 4)
    first = moe(params, x, config)[0]
    np.testing.assert_array_equal(moe(params, x, config)[0], first)
    assert float(jnp.abs(moe(params, x, config, key=KEY)[0] - first).max()) > 1e-2
