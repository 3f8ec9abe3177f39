"""The whole layer, by gather and by einsum, against the numpy oracle: outputs, sums and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import switchmoe as sm
from switchmoe.dispatching.einsum import combine_einsum, dispatch_einsum

from . import oracle
from .worlds import (
    ask_oracle,
    assert_close_to_peak,
    assert_trees_close,
    assign_slots,
    make_config,
    make_params,
    make_routing,
    make_x,
)

# Every option with every other at least somewhere; the capacity is worked out by hand for groups of 6 tokens
# (12 where two sequences make a group) and 3 experts: ceil(factor * tokens * k / 3), at most the group's
# tokens.
CASES = [
    # (config, capacity, masked)
    (dict(top_k=1, capacity_factor=0.5), 1, False),
    (dict(top_k=1, capacity_factor=1.25, drop_order="priority", activation="gelu"), 3, True),
    (dict(top_k=1, capacity_factor=1.0, drop_order="token", gated=True, activation="silu"), 2, False),
    (dict(top_k=1, capacity_factor=1.0, sequences_per_group=2, gated=True, activation="gelu"), 4, True),
    (dict(top_k=1, capacity_factor=8.0, activation="silu"), 6, True),
    (dict(top_k=2, capacity_factor=0.5, drop_order="token"), 2, True),
    (dict(top_k=2, capacity_factor=0.5, drop_order="priority", renormalize=True, gated=True), 2, False),
    (dict(top_k=2, capacity_factor=1.1, renormalize=True, activation="silu"), 5, True),
    (dict(top_k=2, capacity_factor=0.7, sequences_per_group=2, drop_order="priority"), 6, True),
    (dict(top_k=2, capacity_factor=4.0, gated=True, activation="silu", renormalize=True), 6, False),
    (dict(top_k=3, capacity_factor=0.5, drop_order="choice"), 3, True),
    (dict(top_k=3, capacity_factor=0.6, drop_order="token", renormalize=True, activation="gelu"), 4, False),
    (dict(top_k=3, capacity_factor=0.4, drop_order="priority", sequences_per_group=2), 5, True),
    (dict(top_k=2, expert_capacity=1, activation="gelu"), 1, True),
]
MASK = np.array([[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0]], bool)  # padding inside a row and at its end


@functools.partial(jax.jit, static_argnames=("config",))
def run(params, x, pull, mask, config):
    """Output and sums, and the gradients of <pull, y> plus the losses."""

    def scalar(params, x):
        y, aux = sm.moe(params, x, config, train=True, mask=mask)
        metrics = sm.summarize(aux)
        scalar = jnp.sum(pull * y) + 3 * metrics["balance_loss"] + 0.1 * metrics["z_loss"]
        return scalar + 2 * metrics["sequence_balance_loss"] + metrics["importance_loss"], (y, aux)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)


def oracle_scalar(params, x, pull, case):
    """The same scalar from the oracle, with everything in float64."""
    config, capacity, mask = case
    groups = (len(x) // config.sequences_per_group, -1)
    answer = ask_oracle(
        params,
        np.reshape(x, (*groups, x.shape[-1])),
        config=config,
        capacity=capacity,
        mask_GT=None if mask is None else mask.reshape(groups),
    )
    sums, experts = answer.sums, config.num_experts
    balance = experts * np.sum(sums.load_E / sums.choices * sums.prob_sum_E / sums.tokens)
    scalar = np.sum(pull * answer.y_GTD.reshape(x.shape)) + 3 * balance + 0.1 * sums.z_sum / sums.tokens
    scalar += 2 * sums.sequence_balance_sum / sums.sequences
    scalar += np.var(sums.prob_sum_E) / np.mean(sums.prob_sum_E) ** 2  # importance
    return scalar, answer


@pytest.mark.parametrize(("options", "capacity", "masked"), CASES, ids=lambda value: str(value)[:60])
def test_gather_is_einsum_is_oracle(options, capacity, masked):
    config = make_config(**options)
    params, x = make_params(1, gated=config.gated), make_x(1, 2, 6, 4)
    pull = np.random.default_rng(5).standard_normal(x.shape)
    mask = MASK if masked else None
    grads, (y, aux) = run(params, x, pull, mask, config)
    einsum_grads, (einsum_y, einsum_aux) = run(
        params, x, pull, mask, make_config(**options, dispatch="einsum")
    )
    case = (config, capacity, mask)
    _, answer = oracle_scalar(params, x, pull, case)

    assert_close_to_peak(y, answer.y_GTD.reshape(x.shape), name="y")
    assert_close_to_peak(einsum_y, y, name="einsum y")
    for name, sum_, expected in zip(aux._fields, aux, answer.sums, strict=True):
        np.testing.assert_allclose(sum_, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert_trees_close(einsum_aux, aux)
    assert_trees_close(einsum_grads, grads)

    # The gradient along random directions, one leaf at a time, against central differences of the float64
    # oracle. They move nobody to another expert, so the jump of the routing is not in it.
    rng = np.random.default_rng(6)
    leaves, treedef = jax.tree.flatten((params, x))
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    for i, grad in enumerate(jax.tree.leaves(grads)):
        direction = rng.standard_normal(leaves[i].shape)

        def along(leaf, i=i):
            moved = jax.tree.unflatten(treedef, [*leaves[:i], leaf, *leaves[i + 1 :]])
            return oracle_scalar(*moved, pull, case)[0]

        expected = oracle.slope(along, leaves[i], direction)
        actual = float(np.sum(np.asarray(grad, np.float64) * direction))
        assert abs(actual - expected) < 2e-5 * np.linalg.norm(grad) * np.linalg.norm(direction), (
            i,
            actual,
            expected,
        )


def test_cases_drop_and_seat():
    # The table above is worth its name only if it has both: choices without a seat and full layers.
    dropped = []
    for options, capacity, masked in CASES:
        config = make_config(**options)
        x, params = make_x(1, 2, 6, 4), make_params(1, gated=config.gated)
        _, answer = oracle_scalar(params, x, np.zeros(x.shape), (config, capacity, MASK if masked else None))
        dropped.append(answer.sums.dropped)
    assert sum(count > 0 for count in dropped) >= 8 and sum(count == 0 for count in dropped) >= 2


MOVES = {
    "gather": (jax.jit(sm.dispatch), jax.jit(sm.combine)),
    "einsum": (jax.jit(dispatch_einsum), jax.jit(combine_einsum)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("leading", [(), (2,)])
def test_gradient_rules_numerically(name, leading):
    # Both moves are linear in what is moved, so a central difference with a wide step is exact but for
    # rounding.
    dispatch, combine = MOVES[name]
    gates = np.random.default_rng(0).random((*leading, 6, 3))
    mask = np.arange(6) != 2
    plan = assign_slots(make_routing(gates, 2, np.broadcast_to(mask, (*leading, 6))), capacity=3)
    assert 0 < plan.kept_GTK.sum() < 10 * max(1, sum(leading))  # some are dropped
    x, y = make_x(2, *leading, 6, 4), make_x(3, *leading, 3, 3, 4)

    def carry(x):  # check_grads hands over numpy arrays
        return dispatch(jnp.asarray(x), plan)

    def bring(y, weight):
        return combine(jnp.asarray(y), plan._replace(weight_GEC=jnp.asarray(weight)))

    check_grads(jax.jit(carry), (x,), order=1, modes=["rev"], eps=0.5)
    check_grads(jax.jit(bring), (y, plan.weight_GEC), order=1, modes=["rev"], eps=0.5)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_dispatch_and_combine_seat_by_seat(leading):
    gates = np.random.default_rng(1).random((*leading, 6, 3))
    plan = assign_slots(make_routing(gates, 2), capacity=3)
    x, y = make_x(4, *leading, 6, 4), make_x(5, *leading, 3, 3, 4)
    expected_x, expected_y = np.zeros(y.shape), np.zeros(x.shape)
    for at in np.ndindex(plan.token_GEC.shape):
        token = int(plan.token_GEC[at])
        if token < 6:
            expected_x[at] = x[*at[:-2], token]
            expected_y[*at[:-2], token] += float(plan.weight_GEC[at]) * np.asarray(y[at], np.float64)
    for dispatch, combine in MOVES.values():
        np.testing.assert_array_equal(dispatch(x, plan), expected_x)
        np.testing.assert_allclose(combine(y, plan), expected_y, rtol=1e-5, atol=1e-6)
