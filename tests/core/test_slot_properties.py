"""What holds of every plan, by seats or by rows, and of the layer on top, over random tokens and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import switchmoe as sm
from switchmoe.dispatching.dropless import sort_choices

from .test_slots import ORDERS, cases
from .worlds import assign_slots, make_config, make_params, make_routing, make_x

TOKENS, EXPERTS = 6, 3
dispatch, combine = jax.jit(sm.dispatch), jax.jit(sm.combine)


@pytest.mark.parametrize("drop_order", ORDERS)
@settings(max_examples=40)
@given(case=cases())
def test_empty_seats_and_dropped_tokens_are_inert(drop_order, case):
    # An empty seat holds 0, and what an expert makes of it, a NaN even, reaches nobody; a token without a
    # seat gets exactly 0, and every other the weighted sum of its own seats.
    gates, k, capacity, mask = case
    tokens, experts = gates.shape
    plan = assign_slots(make_routing(gates, k, mask), capacity=capacity, drop_order=drop_order)
    x = 1 + jnp.arange(tokens * 2.0).reshape(tokens, 2)
    x_ECD = np.asarray(dispatch(x, plan))
    empty_EC = np.asarray(plan.token_GEC) == tokens
    assert (x_ECD[empty_EC] == 0).all()
    np.testing.assert_array_equal(x_ECD[~empty_EC], np.asarray(x)[np.asarray(plan.token_GEC)[~empty_EC]])
    y = np.asarray(combine(jnp.where(empty_EC[..., None], jnp.nan, x_ECD), plan))
    seated_T = np.asarray(plan.kept_GTK).any(-1)
    assert (y[~seated_T] == 0).all() and not seated_T[~mask].any()
    best_TK = -np.sort(-gates, axis=-1)[:, :k]  # the weights, best first
    expected = np.where(plan.kept_GTK, best_TK, 0).sum(-1)
    np.testing.assert_allclose(y, expected[:, None] * x, rtol=1e-6)


@settings(max_examples=60)
@given(case=cases(), seed=st.integers(0, 99))
def test_sorted_rows_are_the_choices_expert_by_expert(case, seed):
    gates, k, _, mask = case
    tokens, experts = gates.shape
    unused_TK = np.random.default_rng(seed).random((tokens, k)) < 0.2
    routing = make_routing(gates, k, mask)
    expert_TK = np.where(unused_TK, experts, np.asarray(routing.expert_GTK))
    routing = routing._replace(expert_GTK=jnp.asarray(expert_TK, jnp.int32))
    plan = sort_choices(jax.tree.map(lambda leaf: leaf[None], routing))
    # The choices that count, sorted by expert; within one in the order of the tokens.
    asks = [(expert_TK[t, j], t, j) for t in range(tokens) for j in range(k)]
    asks = sorted((e, t * k + j) for e, t, j in asks if mask[t] and e < experts)
    used = len(asks)
    assert plan.token_R.shape == (tokens * k,)
    assert [int(choice) for choice in plan.choice_R[:used]] == [choice for _, choice in asks]
    assert [int(token) for token in plan.token_R[:used]] == [choice // k for _, choice in asks]
    np.testing.assert_array_equal(
        plan.size_E, [sum(e == expert for e, _ in asks) for expert in range(experts)]
    )
    # Past the last expert's rows stands nobody, with no weight.
    assert (np.asarray(plan.token_R)[used:] == tokens).all() and (np.asarray(plan.weight_R)[used:] == 0).all()
    row_of = {choice: row for row, (_, choice) in enumerate(asks)}
    expected = [[row_of.get(t * k + j, tokens * k) for j in range(k)] for t in range(tokens)]
    np.testing.assert_array_equal(plan.row_NK, expected)
    weight_N = np.asarray(routing.weight_GTK).reshape(-1)
    np.testing.assert_array_equal(plan.weight_R[:used], weight_N[[choice for _, choice in asks]])


def test_rows_of_several_groups_are_one_list():
    # Two groups of two tokens, one choice: t0 -> 1, t1 -> 0 | t2 -> 0, t3 -> 1 (padding).
    gates = [[[0.2, 0.8], [0.9, 0.1]], [[0.7, 0.3], [0.4, 0.6]]]
    plan = sort_choices(make_routing(gates, 1, [[True, True], [True, False]]))
    assert plan.token_R.tolist() == [1, 2, 0, 4] and plan.size_E.tolist() == [2, 1]
    assert plan.row_NK.tolist() == [[2], [0], [1], [4]]
    np.testing.assert_allclose(plan.weight_R, [0.9, 0.7, 0.8, 0])


@functools.partial(jax.jit, static_argnames="config")
def run(params, x, mask, config):
    def scalar(params, x):
        y, aux, trace = sm.moe_with_trace(params, x, config, mask=mask)
        return jnp.sum(jnp.sin(y)), (y, aux, trace)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), flags=st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS))
def test_unused_experts_of_nan_harm_nobody_and_dropped_tokens_get_nothing(dispatch, seed, flags):
    # Whoever has no token holds NaN: outputs, sums and all other gradients are those without it.
    config = make_config(dispatch=dispatch, eval_capacity_factor=0.5, top_k=2)
    params, x, mask = make_params(seed % 7), 2 * make_x(seed, 1, TOKENS, 4), np.array([flags])
    # One expert that hardly anybody wants, so that some have no token.
    params = params._replace(router=params.router.at[:, seed % EXPERTS].set(0.0) * 3)
    (grads, x_grad), (y, aux, trace) = run(params, x, mask, config)
    unused = np.asarray(aux.load_E) == 0
    poison = jax.tree.map(lambda leaf: jnp.where(unused[:, None, None], jnp.nan, leaf), params.experts)
    (bad_grads, bad_x_grad), (bad_y, bad_aux, _) = run(params._replace(experts=poison), x, mask, config)
    np.testing.assert_array_equal(bad_y, y)
    np.testing.assert_array_equal(bad_x_grad, x_grad)
    np.testing.assert_array_equal(bad_grads.router, grads.router)
    jax.tree.map(np.testing.assert_array_equal, bad_aux, aux)
    for leaf, clean in zip(*map(jax.tree.leaves, (bad_grads.experts, grads.experts)), strict=True):
        np.testing.assert_array_equal(leaf[~unused], clean[~unused])
    served = np.asarray(trace.kept_SK).any(-1)
    assert (np.asarray(y)[~served] == 0).all() and (np.asarray(x_grad)[~served] == 0).all()
    assert not served[~mask].any() and (dispatch != "dropless" or served[mask].all())
    assert int((mask & ~served).sum()) == int(aux.unserved)
