"""A step of a run that is given weights and a teacher, on 8 devices against one, in a process of its own.

Adapters of the experts are trained, so most weights are frozen and lie in parts all the same.
"""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from switchmoe.data import batches, load_packed
from switchmoe.parallel import MeshConfig, make_layout
from switchmoe.train import Teacher, TuneConfig
from switchmoe.train.given import Given, check_given
from switchmoe.train.model import adapted_model, pure_model
from switchmoe.train.placement import (
    abstract_state,
    draw_noise_key,
    draw_state,
    jit_step,
    place_batch,
    place_weights,
)
from switchmoe.train.step import make_train_step
from tests.train.worlds import made_up_state, small_config

config = small_config(
    Path(os.environ["WORK"]), moe=dict(dispatch="dropless", sequences_per_group=1), batch_size=8
)
model = dataclasses.replace(config.model, num_layers=1, moe_every=1, num_kv_heads=2)
config = dataclasses.replace(config, model=model)
start = made_up_state(config).everything()
dense = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=None, d_ff=16))
teacher = Teacher(made_up_state(dense).params, dense.model)
config = dataclasses.replace(config, tune=TuneConfig(part="lora", lora_rank=2, soft_share=0.5))
source = batches(load_packed(config.data).train, 8, seed=0)


def run(layout):
    check_given(config, Given(start, teacher), layout)
    model = adapted_model(pure_model(config.model, layout), config.tune)
    teaching = pure_model(teacher.config, layout)
    state, first = (draw_state(config, model, start) for _ in range(2))
    step = jit_step(make_train_step(config, model, teaching), config, model, taught=True)
    taught = place_weights(teaching, teacher.params)
    batch = place_batch(layout, source, 0)
    new, metrics = jax.block_until_ready(step(state, batch, draw_noise_key(config, model), taught))
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, model))
    for leaf, place in zip(jax.tree.leaves(new), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, new.frozen, start)
    return jax.device_get((first, new, metrics)), new


(first, new, metrics), _ = run(None)
(first_there, new_there, metrics_there), placed = run(make_layout(MeshConfig(2, 1, 2, 2)))
jax.tree.map(np.testing.assert_array_equal, first, first_there)
np.testing.assert_allclose(metrics["grad_norm"], metrics_there["grad_norm"], rtol=1e-5)
for was, one, other in zip(
    *(jax.tree.leaves(state.params) for state in (first, new, new_there)), strict=True
):
    change = np.abs(one - was).max()
    assert change > 1e-4 or was.any()  # the other half of an adapter moves once this one is not zero
    assert np.abs(one - other).max() <= 1e-3 * change, (
        one.shape,
        change,
        np.abs(one - other).max(),
    )
expert = placed.frozen["blocks"]["layer_0"]["feed_forward"]["w_in_EDF"]
print(expert.shape, expert.addressable_shards[0].data.shape)
