"""Dropless dispatch: the order of the rows, the way there and back, and the experts on sorted rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatching.dropless import combine_sorted, dispatch_sorted, sort_choices
from switchmoe.dispatching.grouped import BACKENDS
from switchmoe.routing.base import Routing
from switchmoe.sorted_experts import apply_experts_sorted

from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_params, make_x, moe

HERE = [name for name, backend in BACKENDS.items() if not backend.available("cpu")]


def make_choices(expert_GTK, weight_GTK=None, mask_GT=None, num_experts=3):
    """A Routing with these choices; a choice of expert E is not used and weighs 0."""
    expert_GTK = np.asarray(expert_GTK, np.int32)
    if weight_GTK is None:
        weight_GTK = np.random.default_rng(0).uniform(0.2, 1.0, expert_GTK.shape)
    weight_GTK = np.where(expert_GTK < num_experts, weight_GTK, 0.0)
    scores_GTE = jnp.full((*expert_GTK.shape[:2], num_experts), 1 / num_experts)
    mask_GT = np.ones(expert_GTK.shape[:2], bool) if mask_GT is None else np.asarray(mask_GT)
    return Routing(
        jnp.asarray(expert_GTK),
        jnp.asarray(weight_GTK, jnp.float32),
        jnp.log(scores_GTE),
        scores_GTE,
        jnp.asarray(mask_GT),
    )


# Two groups of three tokens with two choices each, among three experts. Token 1 of group 1 is padding, and
# the second choice of its token 2 is not used (expert 3). Choices, numbered (group * 3 + token) * 2 + choice:
#   0: 2   1: 0   2: 0   3: 2   4: 2   5: 0   |   6: 0   7: 2   8, 9: padding   10: 2   11: not used
# Expert 0 has choices 1, 2, 5, 6, expert 1 none, expert 2 has 0, 3, 4, 7, 10; then 8, 9, 11.
GOLDEN = make_choices(
    [[[2, 0], [0, 2], [2, 0]], [[0, 2], [0, 1], [2, 3]]],
    mask_GT=[[True, True, True], [True, False, True]],
)


def test_golden():
    plan = sort_choices(GOLDEN)
    assert plan.choice_R.tolist() == [1, 2, 5, 6, 0, 3, 4, 7, 10, 8, 9, 11]
    # The token of a choice is half of its number; past the last expert's rows it is 6, no token.
    assert plan.token_R.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 5, 6, 6, 6]
    assert plan.size_E.tolist() == [4, 0, 5]
    assert plan.row_NK.tolist() == [[4, 0], [1, 5], [6, 2], [3, 7], [12, 12], [8, 12]]
    weights = np.asarray(GOLDEN.weight_GTK).reshape(-1)
    np.testing.assert_array_equal(plan.weight_R, [*weights[[1, 2, 5, 6, 0, 3, 4, 7, 10]], 0, 0, 0])


def test_way_there_and_back_and_their_gradients():
    # Against one-hot tables: row r holds token_R[r], and a token is the weighted sum of its rows.
    plan, x_GTD, g_RD = sort_choices(GOLDEN), make_x(0, 2, 3, 4), make_x(1, 12, 4)
    table_RN = jax.nn.one_hot(plan.token_R, 6)  # the row of no token is 0

    def there(x_GTD):
        return dispatch_sorted(x_GTD, plan)

    def back(y_RD, weight_R):
        return combine_sorted(y_RD, plan._replace(weight_R=weight_R), 2)

    x_RD, pull_back = jax.vjp(there, x_GTD)
    assert_close_to_peak(x_RD, table_RN @ x_GTD.reshape(6, 4))
    assert_close_to_peak(pull_back(g_RD)[0].reshape(6, 4), table_RN.T @ g_RD)

    poisoned_RD = g_RD.at[9:].set(jnp.nan)  # the last three rows are nobody's
    clean_RD = g_RD.at[9:].set(0.0)
    y_GTD, pull_back = jax.vjp(back, poisoned_RD, plan.weight_R)
    assert_close_to_peak(y_GTD.reshape(6, 4), table_RN.T @ (plan.weight_R[:, None] * clean_RD))
    assert not np.any(y_GTD[1, 1])  # padding
    dy_RD, dweight_R = pull_back(x_GTD)
    assert_close_to_peak(dy_RD, plan.weight_R[:, None] * (table_RN @ x_GTD.reshape(6, 4)))
    assert_close_to_peak(dweight_R, jnp.sum((table_RN @ x_GTD.reshape(6, 4)) * clean_RD, axis=1))


@pytest.mark.parametrize("implementation, gated", [(None, True), *((name, False) for name in HERE)])
def test_layer_equals_gather_with_seats_for_all(implementation, gated):
    params, x = make_params(3, experts=5, gated=gated), make_x(3, 2, 11, 4)
    mask = jnp.ones((2, 11), bool).at[1, 6:].set(False)
    options = dict(num_experts=5, top_k=2, gated=gated, activation="silu")
    dropless = make_config(dispatch="dropless", matmul=implementation, **options)
    gather = make_config(dispatch="gather", expert_capacity=11, **options)

    def loss(params, x, config):
        y, aux = moe(params, x, config, mask=mask)
        return jnp.sum(y * make_x(4, 2, 11, 4)), (y, aux.kept_E, aux.dropped)

    results = [
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, config)
        for config in (dropless, gather)
    ]
    assert_trees_close(*results)
    assert float(results[0][0][1][2]) == 0


def test_unused_experts_and_padding_are_harmless():
    # All choices at expert 1 and 2 of four; experts 0 and 3 hold NaN, and so do the tokens of padding.
    params, x_GTD = make_params(5, experts=4), make_x(5, 1, 7, 4).at[0, 5:].set(jnp.nan)
    mask_GT = [[True] * 5 + [False] * 2]
    plan = sort_choices(make_choices([[[1], [2], [2], [1], [1], [0], [3]]], mask_GT=mask_GT, num_experts=4))
    poison = jnp.array([jnp.nan, 0.0, 0.0, jnp.nan])[:, None, None]
    experts = jax.tree.map(lambda w: w + poison, params.experts)

    @jax.jit
    def run(experts, x_GTD):
        rows = dispatch_sorted(x_GTD, plan)
        return combine_sorted(apply_experts_sorted(experts, rows, plan), plan, 1)

    y_GTD, pull_back = jax.vjp(run, experts, x_GTD)
    d_experts, dx_GTD = pull_back(jnp.ones_like(y_GTD))
    assert np.isfinite(y_GTD).all() and np.isfinite(dx_GTD).all()
    assert not np.any(y_GTD[0, 5:]) and not np.any(dx_GTD[0, 5:]) and np.any(y_GTD[0, :5])
    for leaf in jax.tree.leaves(d_experts):
        assert np.isfinite(leaf).all() and not np.any(leaf[jnp.array([0, 3])]) and np.any(leaf[1])


def test_expert_dropout_follows_the_token_and_its_group():
    # Identity experts on ones show which features were dropped. Other choices of expert, which put the rows
    # in another order, and the two groups one by one with their indices, have to give the same features.
    width, key = 64, jax.random.key(7)
    eye = jnp.broadcast_to(jnp.eye(width), (3, width, width))
    experts = make_params(0).experts._replace(w_in_EDF=eye, w_out_EFD=eye)

    def run(expert_GTK, group_G, key=key):
        ones_GTK = np.ones(np.shape(expert_GTK))
        plan = sort_choices(make_choices(expert_GTK, ones_GTK))
        rows = dispatch_sorted(jnp.ones((*ones_GTK.shape[:2], width)), plan)
        group_G = jnp.asarray(group_G)
        y_RD = apply_experts_sorted(experts, rows, plan, dropout=0.25, key=key, group_G=group_G)
        return np.asarray(combine_sorted(y_RD, plan, len(ones_GTK)))

    y = run([[[0], [1], [2], [0]], [[2], [2], [0], [1]]], [5, 6])
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.08)  # 512 draws: a deviation is 0.019
    np.testing.assert_array_equal(y, run([[[2], [0], [0], [0]], [[1], [0], [2], [2]]], [5, 6]))
    np.testing.assert_array_equal(y[1:], run([[[2], [2], [0], [1]]], [6]))
    assert len({row.tobytes() for row in y.reshape(8, width)}) == 8  # every token has its own
    np.testing.assert_array_equal(run([[[0], [1], [2], [0]]], [5], key=None), 1)
