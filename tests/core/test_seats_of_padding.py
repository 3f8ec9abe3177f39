"""Outside training padding brings no seats, so that what a row is padded to changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatching.chance import expected_drop, padded_drop_table
from switchmoe.seats import capacity, seats_by_tokens

from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_params, make_x, moe

# 8 places with 5 tokens in them: ceil(0.8 * 5 / 3) = 2 seats, and ceil(0.8 * 8 / 3) = 3 for all 8 places.
FACTOR, TOKENS, PLACES = 0.8, 5, 8


def padded(x_BTD, side):
    """The rows in a wider block, at its left or its right, among padding that would crowd out everybody."""
    rows = len(x_BTD)
    mask = np.zeros((rows, PLACES), bool)
    at = slice(0, TOKENS) if side == "left" else slice(PLACES - TOKENS, PLACES)
    mask[:, at] = True
    return jnp.full((rows, PLACES, x_BTD.shape[-1]), 7.0).at[:, at].set(x_BTD), mask, at


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dispatch="einsum"),
        dict(top_k=2, drop_order="token"),
        dict(top_k=2, drop_order="priority"),
        dict(overflow="next"),
        dict(router="gshard", top_k=2),
    ],
    ids=str,
)
def test_a_padded_row_is_the_row(options, side):
    config = make_config(eval_capacity_factor=FACTOR / (2 if "top_k" in options else 1), **options)
    params, x = make_params(3), make_x(3, 4, TOKENS, 4)
    wide, mask, at = padded(x, side)
    y, aux = moe(params, x, config)
    wide_y, wide_aux = moe(params, wide, config, mask=mask)
    assert_close_to_peak(wide_y[:, at], y)
    np.testing.assert_array_equal(np.asarray(wide_y)[~mask], 0)
    if options.get("router") == "gshard":  # with choices that are not used the floor is an estimate
        aux, wide_aux = (sums._replace(expected_dropped=jnp.float32(0)) for sums in (aux, wide_aux))
    assert_trees_close(wide_aux, aux)
    assert float(aux.dropped) > 0 or options.get("overflow") == "next"
    # Seats for all places would have kept more, so the rows above could have told the difference.
    if not options:
        assert float(moe(params, wide, make_config(expert_capacity=3), mask=mask)[1].dropped) < aux.dropped


def test_rows_of_other_lengths_beside_it_change_nothing():
    config = make_config(eval_capacity_factor=FACTOR)
    params, x = make_params(4), make_x(4, 2, PLACES, 4)
    lengths = np.array([5, 8])
    y, _ = moe(params, x, config, mask=np.arange(PLACES) < lengths[:, None])
    for row, length in enumerate(lengths):
        assert_close_to_peak(y[row, :length], moe(params, x[row : row + 1, :length], config)[0][0])


def test_in_training_a_padded_row_has_the_seats_of_a_full_one():
    config = make_config(capacity_factor=FACTOR)
    params, x = make_params(3), make_x(3, 4, TOKENS, 4)
    wide, mask, at = padded(x, "left")
    y, _ = moe(params, wide, config, mask=mask, train=True, key=jax.random.key(0))
    expected, _ = moe(params, wide, make_config(expert_capacity=3), mask=mask)
    assert_close_to_peak(y, expected)


def test_seats_by_tokens():
    config = make_config(eval_capacity_factor=FACTOR)
    assert seats_by_tokens(config, tokens=8, train=False) == (0, 1, 1, 1, 2, 2, 2, 2, 3)
    for other in (make_config(expert_capacity=2), make_config(dispatch="dropless")):
        assert seats_by_tokens(other, tokens=8, train=False) is None
    assert seats_by_tokens(config, tokens=8, train=True) is None


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 3), (3, 3)])
def test_the_floor_of_dropping_by_tokens(experts, k):
    seats_N = (0, *(capacity(n, experts, k, 0.7) for n in range(1, 40)))
    floors = padded_drop_table(experts, k, seats_N)
    assert floors[0] == 0 and len(floors) == 40
    np.testing.assert_allclose(
        floors[1:], [expected_drop(n, experts, k, seats_N[n]) for n in range(1, 40)], rtol=1e-10
    )
