"""The balance loss over a whole batch: micro-batches that know each other's load equal one big batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.config import MoEConfig
from switchmoe.data import make_batch
from switchmoe.models import LMConfig
from switchmoe.routing import MoEAux
from switchmoe.train import TrainConfig, TrainSettings
from switchmoe.train.gradient import make_gradient
from switchmoe.train.model import PureModel

# Rows of two kinds, so that the two micro-batches load their experts differently.
ROWS = np.concatenate([np.random.default_rng(0).integers(low, low + 9, (2, 17)) for low in (10, 200)])
BATCH = make_batch(ROWS.astype(np.uint16), np.zeros(4, np.uint8))
TABLE_VD = np.random.default_rng(1).normal(size=(259, 8)).astype(np.float32)


def config_of(accumulate, balance_over, **settings):
    layer = MoEConfig(
        d_model=8, num_experts=4, balance_over=balance_over, **dict(balance_coef=1.0) | settings
    )
    model = LMConfig(d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, moe_every=1, moe=layer)
    return TrainConfig("test", model, train=TrainSettings(batch_size=4, accumulate=accumulate))


def model_of(noise, calls):
    """A router on fixed embeddings, in a model that says the same of every token."""

    def apply(params, ids_BS, *, key, **_):
        calls.append(1)
        logits_NE = jnp.asarray(TABLE_VD)[ids_BS.ravel()] @ params["router_DE"]
        logits_NE += noise * jax.random.normal(key, logits_NE.shape)
        count = jnp.array([ids_BS.size], jnp.float32)
        sums = dict.fromkeys(MoEAux._fields, jnp.zeros(1)) | {
            "load_E": jax.nn.one_hot(logits_NE.argmax(-1), 4).sum(0)[None],
            "prob_sum_E": jax.nn.softmax(logits_NE).sum(0)[None],
            "smooth_load_E": jnp.full((1, 4), ids_BS.size * 1.0),
            "tokens": count,
            "choices": count,
        }
        return jnp.zeros((*ids_BS.shape, 259)), MoEAux(**sums)

    return PureModel(lambda key: {}, apply, lambda params: None)


@functools.cache
def gradient_of(accumulate, balance_over, noise=0.0, **settings):
    """(router loss, aux, the router's gradient, times that the model was traced)."""
    config, calls = config_of(accumulate, balance_over, **settings), []
    params = {"router_DE": jnp.asarray(TABLE_VD[:8, :4])}
    run = jax.jit(make_gradient(config, model_of(noise, calls)))
    (loss, (cross_entropy, aux)), gradient = run(params, {}, BATCH, jax.random.key(0))
    assert float(cross_entropy) == pytest.approx(np.log(259), rel=1e-6)
    return float(loss - cross_entropy), aux, np.asarray(gradient["router_DE"]), len(calls)


def test_over_the_batch_two_micro_batches_equal_one_big_one():
    whole, parts, alone = gradient_of(1, "batch"), gradient_of(2, "batch"), gradient_of(2, "micro_batch")
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole[1], parts[1])
    peak = np.abs(whole[2]).max()
    assert peak > 1e-3
    np.testing.assert_allclose(parts[2], whole[2], atol=1e-6 * peak)
    assert np.abs(alone[2] - whole[2]).max() > 0.05 * peak  # the micro-batches are not alike


def test_both_passes_see_the_same_choices():
    # With noise, shares counted from other choices than those of the loss's own pass would show.
    loss, aux, _, _ = gradient_of(2, "batch", noise=2.0)
    load_E, prob_E = (np.asarray(part[0], np.float64) for part in (aux.load_E, aux.prob_sum_E))
    assert not np.array_equal(aux.load_E, gradient_of(2, "batch")[1].load_E)
    # Micro-batches of equally many tokens: the mean of their losses has the mean of their P.
    assert loss == pytest.approx(4 * np.sum(load_E / 64 * prob_E / 64), rel=1e-5)


def test_there_is_no_second_pass_where_it_would_change_nothing():
    # Traced for its shapes and for the loop over micro-batches, by each pass.
    assert gradient_of(2, "batch")[3] == 2 * gradient_of(2, "micro_batch")[3] == 4
    assert gradient_of(1, "batch")[3] == 1
    assert gradient_of(2, "batch", balance_coef=0.0, importance_coef=0.1)[3] == 2
