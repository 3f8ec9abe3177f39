"""On 8 devices: one training step and one evaluation on several meshes, each against one device.

The state has an optimizer with a history: the first update of an empty one is the sign of a gradient, and the
sign of a gradient that is 0 but for rounding is anything.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.data import batches, evaluation_batches, load_packed
from switchmoe.parallel import MeshConfig, make_layout
from switchmoe.train.evaluate import evaluate, make_eval_step
from switchmoe.train.model import pure_model
from switchmoe.train.placement import (
    abstract_state,
    draw_noise_key,
    draw_state,
    jit_step,
    place_batch,
    placed_evaluation,
)
from switchmoe.train.step import make_train_step
from tests.train.worlds import small_config, spans_config

work = Path(tempfile.mkdtemp())
# The norm of the gradient is above 0.1, so that it is clipped.
OPTIMIZER = dict(clip_norm=0.1, learning_rate=0.1, schedule="constant")
CASES = {
    "adafactor": small_config(
        work,
        moe=dict(num_experts=8, sequences_per_group=1, bias_step=0.01, balance_over="batch", jitter=0.1),
        optimizer=dict(name="adafactor", factor_at_least=16, **OPTIMIZER),
        batch_size=16,
        accumulate=2,
    ),
    "adamw": small_config(
        work,
        moe=dict(
            num_experts=8, sequences_per_group=1, dispatch="dropless", expert_dropout=0.1, shared_experts=1
        ),
        optimizer=OPTIMIZER,
        batch_size=8,
    ),
    "spans": spans_config(
        work,
        moe=dict(num_experts=8, sequences_per_group=1, bias_step=0.01, init_scale=1.0),
        optimizer=OPTIMIZER,
        batch_size=8,
        accumulate=2,
    ),
}
# data, fsdp, expert, tensor
MESHES = {"adafactor": [(2, 1, 4, 1), (1, 2, 2, 2)], "adamw": [(1, 4, 2, 1)], "spans": [(1, 2, 2, 2)]}


def with_history(path, leaf):
    if path[0].name != "opt_state":
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return np.full(leaf.shape, 10, leaf.dtype)
    return np.random.default_rng(leaf.size).uniform(0.5, 1, leaf.shape).astype(leaf.dtype) * 1e-6


def of_peak(one, other):
    """The largest difference of two arrays, over the largest number in them."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return np.abs(one - other).max() / max(np.abs(one).max(), 1e-30)


def run(config, layout, state=None, parted=True):
    """Draw the run's first state; take a step from `state`, or that one with a history; evaluate `state`.

    Evaluated is what the step starts from, so that no rounding of the step can change a choice there. The
    step gets its rows parted into micro-batches, or parts them itself.
    """
    model = pure_model(config.model, layout)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, model))
    drawn = jax.device_get(draw_state(config, model))
    state = jax.tree.map_with_path(with_history, drawn) if state is None else state

    cut = config.data.corruption
    held_out = evaluation_batches(corpus.validation, config.train.micro_batch_size, limit=1, corruption=cut)
    everything = jax.device_put(state, places).everything()
    seen = placed_evaluation(layout, held_out)
    row = evaluate(make_eval_step(model), everything, seen, corpus.domains)
    row |= row.pop("val_loss_by_domain")

    step = jit_step(make_train_step(config, model), config, model)
    source = batches(corpus.train, config.train.batch_size, seed=0, corruption=cut)
    batch = place_batch(layout, source, 3, config.train.accumulate if parted else 1)
    key = draw_noise_key(config, model)
    new, metrics = jax.block_until_ready(step(jax.device_put(state, places), batch, key))
    for leaf, place in zip(jax.tree.leaves(new), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return state, drawn, new, jax.device_get(metrics) | row


def parts_of_experts(state):
    """The shape of what one device has of the experts' first matrix, and of its statistics."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        keys = [str(key) for key in path]
        if "['w_in_EDF']" in keys:
            name = next(key for key in keys[::-1] if key.startswith(".") and key != ".opt_state")
            found[name] = leaf.addressable_shards[0].data.shape
    return found


def check_that_each_row_is_read_once():
    """Along the tensor axis devices hold the same rows; of each micro-batch a device has rows of its own."""
    source = batches(load_packed(CASES["adamw"].data).train, 16, seed=0)
    whole, read, asked = source.rows(3, 0, 16), source.rows, []
    source.rows = lambda step, *part: asked.append((step, *part)) or read(step, *part)
    layout = make_layout(MeshConfig(2, 1, 2, 2))
    for micro_batches, rows in [(1, 4), (2, 2)]:
        asked.clear()
        placed = place_batch(layout, source, 3, micro_batches)
        assert sorted(asked) == [(3, first, first + rows) for first in range(0, 16, rows)], asked
        for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
            parted = other if micro_batches == 1 else other.reshape(2, 8, *other.shape[1:])
            np.testing.assert_array_equal(one, parted)
            assert {shard.data.shape[micro_batches - 1] for shard in one.addressable_shards} == {rows}


check_that_each_row_is_read_once()
for name, config in CASES.items():
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_kv_heads=2))
    corpus = load_packed(config.data)
    state, drawn, new, numbers = run(config, None)
    moved = jax.tree.map(of_peak, state.params, new.params)
    assert min(jax.tree.leaves(moved)) > 1e-3, f"the step must change what is compared: {moved}"
    assert numbers["grad_norm"] > 0.1, "the gradient must be clipped"
    assert (numbers["dropped_fraction"] > 0.01) == (name != "adamw")
    for sizes in MESHES[name]:
        layout, parted = make_layout(MeshConfig(*sizes)), sizes == MESHES[name][0]
        _, drawn_there, new_there, numbers_there = run(config, layout, state, parted)
        same = jax.tree.map(np.array_equal, drawn, drawn_there)
        assert jax.tree.all(same), f"{sizes}: the first weights differ"
        np.testing.assert_allclose(numbers_there["loss"], numbers["loss"], rtol=1e-6)
        apart = jax.tree.leaves_with_path(jax.tree.map(of_peak, new, new_there))
        worst = max((distance, jax.tree_util.keystr(path)) for path, distance in apart)
        assert worst[0] < 1e-5, (sizes, worst)
        assert numbers.keys() == numbers_there.keys()
        for key, value in numbers.items():
            said = f"{sizes}: {key}"
            np.testing.assert_allclose(numbers_there[key], value, rtol=1e-5, atol=1e-6, err_msg=said)
        _, fsdp, expert, tensor = sizes
        parts = parts_of_experts(new_there)
        whole = (1, 8 // expert, 32 // fsdp, 32 // tensor)
        assert parts[".params"] == whole
        if name != "adafactor":
            assert parts[".mu"] == parts[".nu"] == whole
        else:
            assert parts[".v_row"] == parts[".v_col"] == (1, 8 // expert, 32)
        print(f"{name}: {sizes} {worst[0]:.1e}")
