"""Shared experts beside the routed ones, and choices that are replayed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.execution import Shard
from tests.checks import unchecked

from . import oracle
from .worlds import (
    assert_close_to_peak,
    assert_trees_close,
    make_config,
    make_x,
    moe,
    moe_with_trace,
)

KEY = jax.random.key(7)
MASK = np.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)


def init(config):
    return sm.init_moe(jax.random.key(1), config)


def ffn(experts, number, x, config):
    w_in, w_out, w_gate = (None if w is None else np.asarray(w, np.float64)[number] for w in experts[:3])
    return oracle.feed_forward(np.asarray(x, np.float64), w_in, w_out, w_gate, config.activation)


# Shared experts.


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
def test_every_token_passes_through_the_shared_experts(dispatch):
    # Two shared experts are one FFN of 2 * d_ff beside the routed ones; a dropped token gets that part alone.
    options = dict(dispatch=dispatch, eval_capacity_factor=0.5, init_scale=4.0, gated=True, activation="silu")
    config, plain = make_config(shared_experts=2, **options), make_config(**options)
    params = init(config)
    assert params.shared.w_in_EDF.shape == (1, 4, 10) and params.shared.w_out_EFD.shape == (1, 10, 4)
    x = make_x(1, 2, 6, 4)
    y, aux, trace = moe_with_trace(params, x, config, mask=MASK)
    routed, routed_aux = moe(params._replace(shared=None), x, plain, mask=MASK)
    shared = np.where(MASK[..., None], ffn(params.shared, 0, x, config), 0)
    assert_close_to_peak(np.asarray(y, np.float64) - np.asarray(routed), shared)
    np.testing.assert_array_equal(np.asarray(y)[~MASK], 0)
    assert_trees_close(aux, routed_aux, 0)  # they are in no load and no loss
    dropped = MASK & ~np.asarray(trace.kept_SK).any(-1)
    assert dropped.any() == (dispatch != "dropless")
    assert_close_to_peak(np.where(dropped[..., None], y, 0), np.where(dropped[..., None], shared, 0), 1e-6)


def test_shared_experts_learn_from_every_real_token():
    # d sum(y) / d w_out[f, d] is the sum of h[f] over real tokens, dropped or not.
    config = make_config(shared_experts=1, eval_capacity_factor=0.5)
    params, x = init(config), make_x(2, 2, 6, 4)
    grads = jax.jit(jax.grad(lambda p: sm.moe(p, x, config, mask=jnp.asarray(MASK))[0].sum()))(params)
    hidden = np.maximum(np.asarray(x, np.float64)[MASK] @ params.shared.w_in_EDF[0], 0).sum(0)
    assert_close_to_peak(grads.shared.w_out_EFD[0], np.repeat(hidden[:, None], 4, 1))
    assert float(jnp.abs(grads.shared.w_in_EDF).max()) > 0


def test_shared_experts_have_a_noise_of_their_own():
    config = make_config(shared_experts=1, expert_dropout=0.5, capacity_factor=2.0, eval_capacity_factor=2.0)
    params = init(config)
    row = make_x(3, 1, 6, 4)
    x = jnp.concatenate([row, row])
    y, _ = moe(params, x, config, train=True, key=KEY)
    tail, _ = moe(params, x[1:], config, train=True, key=KEY, shard=Shard(first_group=1))
    assert_close_to_peak(tail, y[1:])
    routed, _ = moe(
        params._replace(shared=None),
        x,
        make_config(expert_dropout=0.5, capacity_factor=2.0),
        train=True,
        key=KEY,
    )
    shared = np.asarray(y - routed)
    quiet = ffn(params.shared, 0, x, config)
    assert np.abs(shared[0] - shared[1]).max() > 1e-3 * np.abs(quiet).max()  # by group
    assert np.abs(shared - quiet).max() > 1e-2 * np.abs(quiet).max()


# Replay.


REPLAYED = [
    dict(top_k=2, eval_capacity_factor=0.7, capacity_factor=0.7),
    dict(top_k=2, renormalize=True, dispatch="dropless"),
    dict(router="gshard", top_k=2, capacity_factor=0.7),  # leaves choices unused
    dict(overflow="next", capacity_factor=1.0),
]


@functools.partial(jax.jit, static_argnames="config")
def run(params, x, config, replay=None):
    """Everything, with the router's gradient."""

    def scalar(params):
        y, aux, trace = sm.moe_with_trace(params, x, config, train=True, key=KEY, replay=replay)
        return jnp.sum(jnp.sin(y)), (y, aux, trace)

    grads, answer = jax.grad(scalar, has_aux=True)(params)
    return *answer, grads


@pytest.mark.parametrize("options", REPLAYED, ids=str)
def test_replaying_its_own_trace_changes_nothing(options):
    config = make_config(init_scale=40.0, **options)
    params, x = init(config), make_x(4, 2, 6, 4)
    y, aux, trace, grads = run(params, x, config)
    again_y, again_aux, again_trace, again_grads = run(params, x, config, trace.expert_SK)
    np.testing.assert_array_equal(again_y, y)
    jax.tree.map(np.testing.assert_array_equal, again_trace, trace)
    assert_trees_close(again_grads, grads, 1e-6)
    if config.overflow == "drop":  # else what is replayed are the experts that tokens got, not their wishes
        assert_trees_close(again_aux, aux, 1e-6)
    if options.get("router") == "gshard":
        assert bool((trace.expert_SK == 3).any())
    assert float(jnp.abs(grads.router).max()) > 1e-3


def test_replayed_experts_are_weighed_by_the_scores_of_now():
    # Other experts than the router's, one of them not used: y = sum of p_e FFN_e(x), the p of these scores.
    config = make_config(top_k=2, init_scale=40.0, dispatch="dropless")
    params, x = init(config), make_x(5, 2, 6, 4)
    replay = jnp.asarray(np.random.default_rng(0).permuted(np.tile([0, 1, 2], (2, 6, 1)), axis=-1)[..., :2])
    replay = replay.at[0, 0, 1].set(3)
    y, aux, trace, grads = run(params, x, config, replay)
    np.testing.assert_array_equal(trace.expert_SK, replay)
    expected = np.zeros(x.shape)
    for g, t, j in np.ndindex(2, 6, 2):
        expert = int(replay[g, t, j])
        if expert < 3:
            probs = oracle.softmax(np.asarray(x[g, t], np.float64) @ np.asarray(params.router, np.float64))
            assert float(trace.weight_SK[g, t, j]) == pytest.approx(probs[expert], rel=1e-4, abs=1e-7)
            expected[g, t] += probs[expert] * ffn(params.experts, expert, x[g, t], config)
    assert_close_to_peak(y, expected)
    assert float(jnp.abs(grads.router).max()) > 1e-4
    counts = np.bincount(np.asarray(replay).reshape(-1), minlength=4)[:3]
    np.testing.assert_array_equal(aux.load_E, counts)
    assert float(aux.choices) == 23


@pytest.mark.parametrize("router", ["expert_choice", "soft_moe"])
def test_where_tokens_do_not_choose_there_is_nothing_to_replay(router):
    config = make_config(router=router)
    with unchecked(), pytest.raises(ValueError, match=f"router='{router}'.*replay=None") as caught:
        replay = jnp.zeros((2, 6, 1), jnp.int32)
        jax.eval_shape(lambda x: sm.moe(init(config), x, config, replay=replay), make_x(0, 2, 6, 4))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_replay_must_be_of_the_same_rows():
    config = make_config()
    for shape in ((2, 5, 1), (1, 6, 1), (6, 1)):
        with unchecked(), pytest.raises(ValueError, match=r"replay has shape .* positions"):
            replay = jnp.zeros(shape, jnp.int32)
            jax.eval_shape(lambda x, r=replay: sm.moe(init(config), x, config, replay=r), make_x(0, 2, 6, 4))


def test_a_replayed_expert_that_is_none_is_a_choice_not_used():
    config = make_config(top_k=2, init_scale=40.0, expert_capacity=2)
    params, x = init(config), make_x(6, 2, 6, 4)
    replay = jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, 6, 1)))
    replay = jnp.concatenate([replay, jnp.full_like(replay, 3)], axis=-1)
    y, aux, *_ = run(params, x, config, replay)
    for other in (-1, 7):
        same_y, same_aux, *_ = run(params, x, config, jnp.where(replay == 3, other, replay))
        np.testing.assert_array_equal(same_y, y)
        assert_trees_close(same_aux, aux, 0)


@pytest.mark.parametrize("replay", [np.zeros((2, 6, 2), np.int32), np.zeros((2, 6, 1), np.float32)], ids=str)
def test_replay_must_hold_the_choices_of_the_config(replay):
    config, x = make_config(), make_x(0, 2, 6, 4)
    with unchecked(), pytest.raises(ValueError, match=r"replay holds . choices a token.*top_k is 1"):
        jax.eval_shape(lambda x: sm.moe(init(config), x, config, replay=jnp.asarray(replay)), x)


def test_who_is_not_moved_on_keeps_its_weights():
    # GShard with a bias: the second expert, where it is skipped, was not the next most probable one. With a
    # seat for everybody overflow="next" moves nobody, and changes nothing.
    x, bias = make_x(7, 2, 6, 4), jnp.array([0.0, 0.9, 0.0])
    made = []
    for overflow in ("drop", "next"):
        config = make_config(router="gshard", top_k=2, init_scale=40.0, expert_capacity=6, overflow=overflow)
        made.append(sm.moe_with_trace(init(config), x, config, train=True, key=jax.random.key(2), bias=bias))
    assert bool((made[0][2].expert_SK == 3).any())
    np.testing.assert_array_equal(made[1][0], made[0][0])


def test_without_a_token_every_loss_has_a_finite_gradient():
    losses = dict(balance_coef=1.0, sequence_balance_coef=1.0, importance_coef=1.0, load_coef=1.0, z_coef=1.0)
    config = make_config(router="noisy_top_k", top_k=2, **losses)
    x, mask = make_x(8, 2, 6, 4), jnp.zeros((2, 6), bool)

    def loss(params):
        return sm.aux_loss(sm.moe(params, x, config, train=True, key=jax.random.key(0), mask=mask)[1], config)

    grads = jax.jit(jax.grad(loss))(init(config))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_random_routing_without_a_key_follows_the_group_and_not_the_device():
    config = make_config(router="random")
    params, x = init(config), make_x(9, 4, 6, 4)
    whole = sm.moe_with_trace(params, x, config)[2]
    part = sm.moe_with_trace(params, x[2:], config, shard=Shard(first_group=2))[2]
    np.testing.assert_array_equal(part.expert_SK, whole.expert_SK[2:])
    assert bool((whole.expert_SK[:2] != whole.expert_SK[2:]).any())
