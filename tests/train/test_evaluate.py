"""Validation losses by domain, against sums worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.data import make_batch
from switchmoe.routing import MoEAux
from switchmoe.train.evaluate import EvalSums, evaluate, make_eval_step
from switchmoe.train.model import PureModel

DOMAINS = ("a", "b", "c")


def batch(rows, domains):
    """Rows of two tokens and a target each; 0 pads."""
    return make_batch(np.array(rows, np.uint16), np.array(domains, np.uint8))


def model(logits_V):
    """A model that says the same about every position."""
    return PureModel(
        None, lambda params, ids_BS, **_: (jnp.broadcast_to(logits_V, (*ids_BS.shape, 8)), None), None
    )


def test_losses_are_means_over_the_tokens_of_a_domain():
    # p(3) = 1/2, p(4) = 1/4, p(5) = 1/8 ..., so -log p is 1, 2, 3 bits. Domain a: targets 3, 4 and 3, 3: 5
    # bits over 4 tokens. Domain b: targets 5, 5 and 4 with one of padding: 8 bits over 3. Nothing of c. In
    # all 13 bits over 7.
    probability = [0, 0, 0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    step = make_eval_step(model(jnp.log(jnp.array(probability) + 1e-30)))
    batches = [
        batch([[3, 3, 4], [3, 5, 5]], [0, 1]),
        batch([[3, 4, 0], [3, 3, 3]], [1, 0]),
        batch([[0, 0, 0]], [0]),
    ]
    row = evaluate(step, {}, batches, DOMAINS)
    bit = np.log(2)
    assert row["val_loss_by_domain"] == pytest.approx({"a": 5 / 4 * bit, "b": 8 / 3 * bit})
    assert row["val_loss"] == pytest.approx(13 / 7 * bit)
    assert (row["val_dropped_fraction"], row["val_max_vio"], row["val_load_fraction"]) == (0.0, 0.0, [])


def test_router_sums_are_added_before_ratios_are_made():
    # One layer, two experts. Loads (6, 2) and (2, 6) are even over both batches: MaxVio 0, not the mean of
    # 0.5 and 0.5.
    def aux(load, dropped):
        eight, load_LE = jnp.full(1, 8.0), jnp.array([load])
        fields = {name: load_LE if name.endswith("_E") else eight for name in MoEAux._fields}
        return MoEAux(**fields | {"dropped": jnp.array([dropped]), "expected_dropped": jnp.zeros(1)})

    parts = iter([aux([6.0, 2.0], 4.0), aux([2.0, 6.0], 0.0)])

    def step(params, batch):
        return EvalSums(jnp.ones(1), jnp.ones(1), next(parts))

    row = evaluate(step, {}, [batch([[3, 3, 3]], [0])] * 2, DOMAINS)
    assert row["val_max_vio"] == pytest.approx(0.0, abs=1e-6)
    assert row["val_dropped_fraction"] == pytest.approx(4 / 16)
    assert row["val_load_fraction"] == [[0.5, 0.5]]


def test_nothing_to_predict_is_an_error():
    step = make_eval_step(model(jnp.zeros(8)))
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(step, {}, [batch([[0, 0, 0]], [0])], DOMAINS)
