"""One step: accumulation, skipped updates, noise, and the loss against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.data import batches, load_packed
from switchmoe.train.gradient import forward
from switchmoe.train.model import PureModel, pure_model
from switchmoe.train.step import init_state, make_train_step

from .worlds import small_config

KEY = jax.random.key(7)
PLAIN = dict(clip_norm=0.0, weight_decay=0.0)


@functools.cache
def compiled(config):
    model = pure_model(config.model)
    return jax.jit(make_train_step(config, model)), jax.jit(lambda: init_state(config, model))()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("step")


def first_batch(config):
    return batches(load_packed(config.data).train, config.train.batch_size, seed=0)[0]


def noisy(folder):
    """The sparse configuration of these tests: jitter, two micro-batches, two bad steps allowed."""
    return small_config(folder, moe=dict(jitter=0.3), accumulate=2, max_bad_steps=2)


def uneven(batch):
    """Take weight away so that micro-batches carry different shares of it."""
    weight = batch.weight_BS.copy()
    weight[0, 3:] = 0.0
    weight[3, 20:] = 0.0
    return batch._replace(weight_BS=weight)


def moved(state, new):
    return jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), state.params, new.params)


def test_accumulated_micro_batches_equal_one_big_batch(folder):
    # Dense, without clipping and decay, so that AdamW's first mean is the gradient times 1 - beta1.
    config = small_config(folder, sparse=False, optimizer=PLAIN)
    batch = uneven(first_batch(config))
    gradients, losses = [], []
    for accumulate in (1, 4):
        step, state = compiled(small_config(folder, sparse=False, optimizer=PLAIN, accumulate=accumulate))
        new, metrics = step(state, batch, KEY)
        gradients.append(new.opt_state[1].mu)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    for whole, parts in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.abs(whole).max() > 0
        np.testing.assert_allclose(parts, whole, atol=1e-5 * np.abs(whole).max())


def test_accumulation_counts_every_token_of_a_sparse_model_once(folder):
    config = noisy(folder)
    step, state = compiled(config)
    _, metrics = step(state, first_batch(config), KEY)
    assert metrics["load_fraction"].shape == (1, 4)  # one sparse layer, one choice a token
    assert float(metrics["load_fraction"].sum()) == pytest.approx(1.0)


def test_the_loss_is_the_weighted_mean_of_minus_log_p(folder):
    config = small_config(folder, sparse=False, optimizer=PLAIN)
    step, state = compiled(config)
    batch = uneven(first_batch(config))
    _, metrics = step(state, batch, KEY)
    model = pure_model(config.model)
    logits, _ = jax.jit(lambda params, rows: forward(model, params, rows, train=True))(state.params, batch)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, batch.targets_BS[..., None], -1)[..., 0]
    expected = (nats * batch.weight_BS).sum() / batch.weight_BS.sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(folder, poison):
    config = noisy(folder)
    step, state = compiled(config)
    good = first_batch(config)
    weight = good.weight_BS.copy()
    weight[1, 5] = poison
    bad = good._replace(weight_BS=weight)

    after_bad, metrics = step(state, bad, KEY)
    assert not np.isfinite(metrics["loss"])
    same(after_bad.params, state.params)
    same(after_bad.opt_state, state.opt_state)
    assert counters(after_bad) == (1, 1, 1)

    after_good, metrics = step(after_bad, good, KEY)
    assert counters(after_good) == (2, 1, 0)
    assert max(np.abs(a).max() for a in jax.tree.leaves(moved(after_bad, after_good))) > 0
    # The schedule counts updates: this was the first one, with warm-up over two of them.
    assert float(metrics["learning_rate"]) == pytest.approx(config.optimizer.learning_rate / 2)

    # Two bad ones in a row are the limit: from then on nothing moves, so the host may look late.
    stuck = after_good
    for batch in (bad, bad, good):
        stuck, _ = step(stuck, batch, KEY)
    same(stuck.params, after_good.params)
    assert counters(stuck) == (5, 4, 3)


def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is(folder):
    # The root of a weight of 0 is finite and has an infinite slope.
    def apply(params, ids_BS, **_):
        return jnp.broadcast_to(jnp.sqrt(params["w_V"]), (*ids_BS.shape, 259)), None

    config = small_config(folder, sparse=False)
    model = PureModel(lambda key: {"w_V": jnp.zeros(259)}, apply, lambda params: None)
    state = init_state(config, model)
    new, metrics = jax.jit(make_train_step(config, model))(state, first_batch(config), KEY)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    same(new.params, state.params)
    assert counters(new) == (1, 1, 1)


def test_noise_follows_the_step_and_the_key_alone(folder):
    config = noisy(folder)
    step, state = compiled(config)
    batch = first_batch(config)
    later = state._replace(step=jnp.int32(5))
    losses = [float(step(s, batch, k)[1]["loss"]) for s, k in [(state, KEY), (state, KEY), (later, KEY)]]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != float(step(state, batch, jax.random.key(8))[1]["loss"])


def counters(state):
    return int(state.step), int(state.skipped), int(state.bad_in_a_row)


def same(first, second):
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)
