"""Seats that have no inverse, as expert choice makes them: a token may sit in none, one or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatching import SlotPlan, combine, combine_einsum, dispatch, dispatch_einsum

from .worlds import assert_close_to_peak, assert_trees_close

TOKENS, WIDTH = 4, 3
# Of two groups, two experts with two seats each; 4 names no token. In the first group token 1 sits twice and
# token 3 nowhere; in the second expert 1 is empty.
TOKEN_GEC = np.array([[[0, 1], [1, 2]], [[3, 0], [4, 4]]], np.int32)
WEIGHT_GEC = np.array([[[0.5, 0.25], [2.0, 1.0]], [[1.0, 0.5], [0.0, 0.0]]], np.float32)


def make_plan(weight_GEC=WEIGHT_GEC):
    none_GTK = jnp.zeros((2, TOKENS, 0), jnp.int32)
    return SlotPlan(jnp.asarray(TOKEN_GEC), jnp.asarray(weight_GEC), none_GTK, none_GTK > 0)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_each_tokens_seats_add_up():
    y_GECD = draw(0, 2, 2, 2, WIDTH).at[1, 1].set(jnp.nan)  # nobody sits there
    expected = np.zeros((2, TOKENS, WIDTH))
    expected[0, 0] = 0.5 * y_GECD[0, 0, 0]
    expected[0, 1] = 0.25 * y_GECD[0, 0, 1] + 2.0 * y_GECD[0, 1, 0]
    expected[0, 2] = y_GECD[0, 1, 1]
    expected[1, 3], expected[1, 0] = y_GECD[1, 0, 0], 0.5 * y_GECD[1, 0, 1]
    y_GTD = jax.jit(combine)(y_GECD, make_plan())
    assert_close_to_peak(y_GTD, expected)
    assert not np.any(np.asarray(y_GTD)[[0, 1, 1], [3, 1, 2]])  # exactly 0 without a seat


def test_each_seat_gets_its_token():
    x_GTD = draw(1, 2, TOKENS, WIDTH)
    x_GECD = np.asarray(jax.jit(dispatch)(x_GTD, make_plan()))
    for group, expert, seat in np.ndindex(TOKEN_GEC.shape):
        token = TOKEN_GEC[group, expert, seat]
        expected = np.zeros(WIDTH) if token == TOKENS else x_GTD[group, token]
        np.testing.assert_array_equal(x_GECD[group, expert, seat], expected)


@pytest.mark.parametrize("empty", [1.0, np.nan])
def test_gradients_are_those_of_the_one_hot_reference(empty):
    """Also when the empty expert says NaN: then its seats get gradient 0, and no other gradient sees it."""
    x_GTD, g_GTD = draw(2, 2, TOKENS, WIDTH), draw(3, 2, TOKENS, WIDTH)
    factor_GECD = draw(4, 2, 2, 2, WIDTH).at[1, 1].set(empty)

    def gradients(dispatch, combine):
        def layer(x_GTD, factor_GECD, weight_GEC):
            plan = make_plan(weight_GEC)
            return jnp.vdot(combine(factor_GECD * dispatch(x_GTD, plan), plan), g_GTD)

        return jax.jit(jax.grad(layer, argnums=(0, 1, 2)))(x_GTD, factor_GECD, jnp.asarray(WEIGHT_GEC))

    found = gradients(dispatch, combine)
    assert all(np.all(np.isfinite(leaf)) for leaf in found)
    if np.isfinite(empty):
        assert_trees_close(found, gradients(dispatch_einsum, combine_einsum))
    else:
        assert_trees_close(found[1], gradients(dispatch_einsum, combine_einsum)[1])
