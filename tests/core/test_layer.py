"""What the layer promises about tokens: permutations, plenty of seats, one expert, groups, padding, NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import switchmoe as sm

from . import oracle
from .worlds import (
    assert_close_to_peak,
    assert_trees_close,
    make_config,
    make_params,
    make_x,
    moe,
    moe_with_trace,
    summarize,
)

DISPATCHES = ("gather", "einsum", "dropless")


@functools.partial(jax.jit, static_argnames=("config",))
def pulled_grads(params, x, pull, mask, config):
    """Gradients of <pull, y> + balance loss + z-loss with respect to parameters and input."""

    def scalar(params, x):
        y, aux = sm.moe(params, x, config, mask=mask)
        metrics = summarize(aux)
        return jnp.sum(pull * y) + metrics["balance_loss"] + metrics["z_loss"]

    return jax.grad(scalar, argnums=(0, 1))(params, x)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_permuting_tokens_permutes_outputs_when_nothing_is_dropped(seed):
    config = make_config(top_k=2, eval_capacity_factor=8.0, drop_order="priority", num_experts=4)
    params, x = make_params(3, experts=4), make_x(seed, 9, 4)
    order = np.random.default_rng(seed).permutation(9)
    y, aux = moe(params, x, config)
    permuted, permuted_aux = moe(params, x[order], config)
    assert float(aux.dropped) == 0
    assert_close_to_peak(permuted, y[order])
    assert_trees_close(permuted_aux, aux)


@pytest.mark.parametrize("options", [dict(), dict(top_k=2, renormalize=True, gated=True, activation="silu")])
def test_plenty_of_seats_is_every_expert_on_every_token(options):
    # With a seat for everyone, y = sum over experts of weight * expert(x), the weight 0 where not chosen.
    config = make_config(**options, eval_capacity_factor=3.0)
    params, x = make_params(4, gated=config.gated), make_x(4, 2, 6, 4)
    y, aux, trace = moe_with_trace(params, x, config)
    weight_BSE = np.zeros((2, 6, 3))
    np.put_along_axis(weight_BSE, np.asarray(trace.expert_SK), np.asarray(trace.weight_SK), -1)
    expected = np.zeros(x.shape)
    for e in range(3):
        w_in, w_out, w_gate = (
            None if w is None else np.asarray(w, np.float64)[e] for w in params.experts[:3]
        )
        every = oracle.feed_forward(np.asarray(x, np.float64), w_in, w_out, w_gate, config.activation)
        expected += weight_BSE[..., e : e + 1] * every
    assert float(aux.dropped) == 0 and bool(trace.kept_SK.all())
    assert_close_to_peak(y, expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_one_expert_is_the_dense_ffn_times_p(dispatch):
    # One expert is chosen with p = 1 and has a seat for every token, so the layer is the plain FFN.
    config = make_config(num_experts=1, dispatch=dispatch)
    params, x = make_params(5, experts=1), make_x(5, 2, 6, 4)
    y, aux = moe(params, x, config)
    dense = (
        np.maximum(np.asarray(x, np.float64) @ params.experts.w_in_EDF[0], 0) @ params.experts.w_out_EFD[0]
    )
    assert_close_to_peak(y, dense)
    assert float(aux.dropped) == 0 and float(summarize(aux)["balance_loss"]) == pytest.approx(1.0)
    # Two experts with the same weights: still the dense FFN, now times the p of the chosen one.
    twins = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params.experts)
    router = make_params(6, experts=2).router
    y, _ = moe(
        params._replace(router=router, experts=twins), x, make_config(num_experts=2, dispatch=dispatch)
    )
    p = jax.nn.softmax(x @ router, axis=-1).max(-1, keepdims=True)
    assert_close_to_peak(y, dense * p)


@pytest.mark.parametrize(
    ("dispatch", "drop_order"),
    [
        *(("gather", order) for order in ("choice", "token", "priority")),
        ("einsum", "token"),
        ("dropless", "token"),
    ],
)
def test_masked_content_changes_nothing(dispatch, drop_order):
    config = make_config(top_k=2, eval_capacity_factor=0.6, dispatch=dispatch, drop_order=drop_order)
    params, x = make_params(7), make_x(7, 2, 6, 4)
    pull = make_x(8, 2, 6, 4)
    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]], bool)
    y, aux = moe(params, x, config, mask=mask)
    grads = pulled_grads(params, x, pull, mask, config)
    assert (float(aux.dropped) > 0) == (dispatch != "dropless")
    assert float(aux.tokens) == 9 and float(aux.choices) == 18
    np.testing.assert_array_equal(np.asarray(y)[~mask], 0)
    np.testing.assert_array_equal(np.asarray(grads[1])[~mask], 0)
    for content in (0.0, 1e4, make_x(9, 2, 6, 4), jnp.nan, jnp.inf):
        other = jnp.where(mask[..., None], x, content)
        other_y, other_aux = moe(params, other, config, mask=mask)
        np.testing.assert_array_equal(other_y, y)
        jax.tree.map(np.testing.assert_array_equal, other_aux, aux)
        jax.tree.map(np.testing.assert_array_equal, pulled_grads(params, other, pull, mask, config), grads)


def test_padding_at_the_end_is_the_shorter_sequence():
    # Masked positions take no seat: with the same seats, the padded row answers as the short row does.
    params, x = make_params(10), make_x(10, 1, 6, 4)
    config = make_config(top_k=2, expert_capacity=2)
    mask = np.arange(6)[None] < 4
    y, aux = moe(params, x, config, mask=mask)
    short_y, short_aux = moe(params, x[:, :4], config)
    assert float(aux.dropped) > 0
    assert_close_to_peak(y[:, :4], short_y)
    assert_trees_close(aux, short_aux)


def test_a_group_without_tokens_counts_nothing():
    params, x = make_params(10), make_x(10, 2, 6, 4)
    y, aux = moe(params, x, make_config(), mask=np.zeros((2, 6), bool))
    assert not y.any() and not any(jnp.any(leaf) for leaf in aux)
    assert all(bool(jnp.isfinite(value).all()) for value in summarize(aux).values())


def test_a_sequence_does_not_see_the_batch():
    config = make_config(eval_capacity_factor=1.0)
    params, x = make_params(11), make_x(11, 3, 6, 4)
    y, aux = moe(params, x, config)
    assert float(aux.dropped) > 0
    for row in range(3):
        assert_close_to_peak(moe(params, x[row : row + 1], config)[0][0], y[row])
        crowd = x.at[(row + 1) % 3].set(x[row] * 3).at[(row + 2) % 3].set(-x[row])
        assert_close_to_peak(moe(params, crowd, config)[0][row], y[row])


def test_groups_are_consecutive_rows():
    # Four rows, two to a group: rows 0-1 share 12 seats' worth of capacity, rows 2-3 share theirs; [T, D] is
    # one group.
    config = make_config(sequences_per_group=2, expert_capacity=3, drop_order="token")
    params, x = make_params(12), make_x(12, 4, 6, 4)
    y, aux = moe(params, x, config)
    halves = [moe(params, half.reshape(12, 4), config) for half in (x[:2], x[2:])]
    assert_close_to_peak(y.reshape(2, 12, 4), np.stack([half_y for half_y, _ in halves]))
    total = sm.add_aux(halves[0][1], halves[1][1])
    # Only the sequences differ: four rows here, two long ones there.
    assert (float(aux.sequences), float(total.sequences)) == (4.0, 2.0)
    alike = dict(sequences=total.sequences, sequence_balance_sum=total.sequence_balance_sum)
    assert_trees_close(aux._replace(**alike), total)
    # 12 tokens, 3 experts, 3 seats each: at most 9 of a group's 12 are kept.
    assert float(aux.dropped) >= 6


@pytest.mark.parametrize("shape", [(6, 4), (1, 6, 4), (2, 6, 4), (2, 3, 6, 4), (2, 1, 2, 1, 4)])
def test_leading_dimensions_are_rows(shape):
    config = make_config(eval_capacity_factor=1.0)
    params, x = make_params(13), make_x(13, *shape)
    y, _ = moe(params, x, config)
    assert y.shape == shape and y.dtype == x.dtype
    rows = x.reshape(-1, *shape[-2:])
    assert_close_to_peak(y.reshape(rows.shape), moe(params, rows, config)[0])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_one_token_is_never_dropped(dispatch):
    config = make_config(eval_capacity_factor=0.1, top_k=2, dispatch=dispatch)
    params, x = make_params(14), make_x(14, 8, 1, 4)
    _, aux, trace = moe_with_trace(params, x, config)
    assert float(aux.dropped) == 0 and bool(trace.kept_SK.all())
