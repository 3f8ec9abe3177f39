"""What a trained model loses when its experts are rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from switchmoe.infer import quantize
from switchmoe.models import TransformerLM
from tests.infer.test_forms import CONFIG, MOE


def test_rounded_a_trained_model_loses_nothing():
    """Trained on counting upwards, from a random start: the loss in 8 bits is within 0.5%, in 4 bits near."""
    seats = dict(dispatch="gather", drop_order="token", eval_capacity_factor=2.0)  # it compiles faster
    moe = dataclasses.replace(MOE, d_model=32, d_ff=32, **seats)
    config = dataclasses.replace(CONFIG, vocab_size=17, d_model=32, num_layers=1, moe=moe)
    graph, weights = nnx.split(TransformerLM(config, rngs=nnx.Rngs(0)))
    rows_BS = jnp.asarray((np.arange(8)[:, None] * 5 + np.arange(12)) % 17)
    adam = optax.adam(3e-3)

    def loss_of(model):
        nats_BS = optax.softmax_cross_entropy_with_integer_labels(
            model(rows_BS[:, :-1])[0][:, 3:], rows_BS[:, 4:]
        )
        return nats_BS.mean()

    @jax.jit
    def train(weights):
        def step(carried, _):
            weights, state = carried
            loss, gradient = jax.value_and_grad(lambda weights: loss_of(nnx.merge(graph, weights)))(weights)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(weights, updates), state), loss

        return jax.lax.scan(step, (weights, adam.init(weights)), length=60)

    (weights, _), losses = train(weights)
    trained = nnx.merge(graph, weights)
    before = float(nnx.jit(loss_of)(trained))
    assert before < 0.5 * losses[0]
    assert float(nnx.jit(loss_of)(quantize(trained, 8))) == pytest.approx(before, rel=0.005)
    assert float(nnx.jit(loss_of)(quantize(trained, 4))) == pytest.approx(before, rel=0.1)
