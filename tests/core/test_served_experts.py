"""Experts laid out for generating are the same layer, for few tokens and for many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe import init_moe
from switchmoe.experts import quantize_experts
from switchmoe.served_execution import FEW
from switchmoe.served_experts import ServedExperts, serve_experts

from .worlds import (
    assert_close_to_peak,
    assert_trees_close,
    make_config,
    make_params,
    make_x,
    moe,
    moe_with_trace,
)


def served(params):
    return params._replace(experts=serve_experts(params.experts))


@pytest.mark.parametrize(
    "dispatch, length, gated",
    [
        ("dropless", 1, True),
        ("dropless", 7, False),
        ("dropless", 40, True),
        ("gather", 7, True),
        ("gather", 40, False),
    ],
)
def test_is_the_same_layer(dispatch, length, gated):
    """Two rows, with padding: 2 and 14 tokens are few, 80 are not, and some expert has several pieces."""
    sizes = dict(top_k=2, gated=gated, drop_order="token", eval_capacity_factor=0.7)
    config = make_config(dispatch=dispatch, **sizes)
    params, x_BSD = make_params(0, gated=gated), make_x(1, 2, length, 4)
    mask_BS = jnp.ones((2, length), bool).at[0, : length // 3].set(False)
    assert (2 * length <= FEW) == (length < 40)
    expected = moe_with_trace(params, x_BSD, config, mask=mask_BS)
    if length == 40 and dispatch == "dropless":
        assert max(expected[1].load_E) > 32
    assert_trees_close(moe_with_trace(served(params), x_BSD, config, mask=mask_BS), expected)


@pytest.mark.parametrize("router", ["expert_choice", "soft_moe"])
def test_is_the_same_layer_where_tokens_do_not_choose(router):
    config = make_config(router=router, **({"slots_per_expert": 2} if router == "soft_moe" else {}))
    params, x_BSD = init_moe(jax.random.key(0), config), make_x(1, 2, 6, 4)
    assert_trees_close(moe(served(params), x_BSD, config), moe(params, x_BSD, config))


@pytest.mark.parametrize("length", [3, 30])
def test_an_idle_expert_reaches_nothing(length):
    """Expert 1 is chosen by nobody and holds NaN."""
    config = make_config(dispatch="dropless")
    params, x_SD = make_params(0), make_x(1, length, 4)
    replay_SK = jnp.asarray(np.arange(length) % 2 * 2)[:, None]
    expected, _ = moe(params, x_SD, config, replay=replay_SK)
    broken = jax.tree.map(lambda w: w.at[1].set(jnp.nan), params.experts)
    actual, _ = moe(served(params._replace(experts=broken)), x_SD, config, replay=replay_SK)
    assert_close_to_peak(actual, expected, 1e-5, "output")


@pytest.mark.parametrize("choose", [1, 2, 3, 5])
def test_an_expert_s_overflow_stays_with_those_who_chose_it(choose):
    """Expert 0 says infinity; the last tokens, which it may be shown as well, did not choose it."""
    config = make_config(dispatch="dropless")
    params = make_params(0)
    experts = params.experts._replace(w_in_EDF=params.experts.w_in_EDF.at[0].set(jnp.inf))
    y_SD, _ = moe(
        served(params._replace(experts=experts)),
        jnp.abs(make_x(1, 7, 4)) + 1,
        config,
        replay=jnp.array([0] * choose + [1, 2] * 3)[:7, None],
    )
    assert np.isfinite(y_SD[choose:]).all() and not np.isfinite(y_SD[:choose]).any()


@pytest.mark.parametrize("bits, length", [(None, 1), (None, 3), (None, 9), (8, 2), (8, 9), (4, 9)])
def test_few_tokens_however_crowded_their_experts_are(bits, length):
    """Experts of 0 to 8 tokens; the first token chooses one of them twice, and padding is NaN."""
    config = make_config(dispatch="dropless", top_k=2, gated=True, d_model=256, d_ff=256)
    params = make_params(0, gated=True, d_model=256, d_ff=256)
    if bits is not None:
        params = params._replace(experts=quantize_experts(params.experts, bits))
    x_SD = make_x(1, length + 1, 256).at[-1].set(jnp.nan)
    mask_S = jnp.arange(length + 1) < length
    replay_SK = jnp.array([[1, 1], [0, 2], [2, 0], [0, 2], *[[2, 1], [0, 2]] * 3])[: length + 1]
    expected, _ = moe(params, x_SD, config, replay=replay_SK, mask=mask_S)
    actual, _ = moe(served(params), x_SD, config, replay=replay_SK, mask=mask_S)
    assert_close_to_peak(actual[:length], expected[:length], 1e-5 if bits is None else 1e-3, "output")


def test_gradients_are_the_same_for_few_tokens():
    config = make_config(dispatch="dropless", top_k=2, gated=True)
    params, x_SD, g_SD = make_params(0, gated=True), make_x(1, 5, 4), make_x(2, 5, 4)

    @jax.jit
    def gradients(params, x_SD):
        def loss(lay_out, params, x_SD):
            return jnp.vdot(moe(lay_out(params), x_SD, config)[0], g_SD)

        return [jax.grad(loss, argnums=(1, 2))(how, params, x_SD) for how in (served, lambda params: params)]

    actual, expected = gradients(params, x_SD)
    assert_trees_close(actual, expected)


def test_says_what_it_is_and_is_not_trained():
    config = make_config(gated=True)
    params = served(make_params(0, gated=True))
    assert isinstance(params.experts, ServedExperts)
    assert params.experts.sizes == (3, 4, 5) and params.experts.gated
    with pytest.raises(ValueError, match="laid out or rounded for generating, and can't be trained"):
        moe(params, make_x(1, 6, 4), config, train=True)
    with pytest.raises(ValueError, match="initialise them with this config"):
        moe(params, make_x(1, 6, 4), make_config(d_ff=6, gated=True))
