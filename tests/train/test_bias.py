"""Balance biases in training: moved once a step by the load, never by the optimizer, saved and read again."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.data import batches, load_packed
from switchmoe.train import load_model, load_params, run_folder, run_training, running
from switchmoe.train.checkpoint import Checkpoints
from switchmoe.train.config import to_json
from switchmoe.train.model import join, pure_model
from switchmoe.train.parts import split_weights
from switchmoe.train.records import write_json
from switchmoe.train.step import TrainState, _move_biases, make_train_step

from .worlds import made_up_state, small_config

KEY = jax.random.key(7)
STEP = 0.125  # exact in float32, so that steps can be counted
SIGMOID = dict(router="sigmoid", top_k=2, bias_step=STEP)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("bias"), moe=SIGMOID, accumulate=2)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1, moe_every=1))


@pytest.fixture
def state(config):
    return jax.tree.map(jnp.asarray, made_up_state(config))


def bias_of(biases):
    (leaf,) = jax.tree.leaves(biases)
    return np.asarray(leaf)


def names(tree):
    return {str(getattr(path[-1], "key", "")) for path, _ in jax.tree.leaves_with_path(tree)}


def test_a_step_moves_them_by_the_load_of_all_micro_batches_and_a_skipped_one_does_not(config, state):
    batch = batches(load_packed(config.data).train, config.train.batch_size, seed=0)[0]
    step = jax.jit(make_train_step(config, pure_model(config.model)))
    np.testing.assert_array_equal(bias_of(state.biases), np.zeros((1, 4), np.float32))
    assert "bias_E" not in names(state.params) | names(state.opt_state)

    new, metrics = step(state, batch, KEY)
    load_LE = np.asarray(metrics["load_fraction"])
    assert float(metrics["choices"][0]) == 2 * batch.mask_BS.sum()  # both micro-batches, two choices a token
    np.testing.assert_array_equal(bias_of(new.biases), STEP * np.sign(0.25 - load_LE))
    assert np.abs(bias_of(new.biases)).max() == STEP

    # They are read: enough of a bias sends every token to the same two experts.
    pushed = state._replace(biases=jax.tree.map(lambda b: jnp.array([[9.0, 9.0, 0.0, 0.0]]), state.biases))
    after, metrics = step(pushed, batch, KEY)
    np.testing.assert_allclose(metrics["load_fraction"], [[0.5, 0.5, 0.0, 0.0]])
    np.testing.assert_array_equal(bias_of(after.biases), [[9 - STEP, 9 - STEP, STEP, STEP]])

    bad = batch._replace(weight_BS=np.full_like(batch.weight_BS, np.nan))
    skipped, _ = step(new, bad, KEY)
    assert int(skipped.skipped) == 1
    np.testing.assert_array_equal(bias_of(skipped.biases), bias_of(new.biases))


def test_a_checkpoint_keeps_them_bit_for_bit_and_loaded_models_use_them(config, state, tmp_path):
    bias_LE = jax.random.normal(KEY, (1, 4))
    state = state._replace(biases=jax.tree.map(lambda _: bias_LE, state.biases))
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "config.json", to_json(config))
    with Checkpoints(folder, config, "text") as checkpoints:
        checkpoints.save(state, 5, {"seconds": 1.0})
    with Checkpoints(folder, config, "text") as checkpoints:
        again, clock = checkpoints.load(jax.tree.map(jnp.zeros_like, state))
    assert clock == {"seconds": 1.0} and isinstance(again, TrainState)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()

    params, saved = load_params(folder)
    assert saved == config
    np.testing.assert_array_equal(bias_of(split_weights(params, "all")[2]), bias_LE)
    model, _ = load_model(folder)
    np.testing.assert_array_equal(model.blocks.layer_0.feed_forward.bias_E[...], bias_LE)
    jax.tree.map(np.testing.assert_array_equal, params, state.everything())


class OldState(NamedTuple):
    """The TrainState of runs from before there were biases."""

    params: Any
    opt_state: Any
    step: Any
    skipped: Any
    bad_in_a_row: Any


def test_an_old_checkpoint_has_none_and_is_read(tmp_path):
    config = small_config(tmp_path, steps=2)
    state = jax.tree.map(jnp.asarray, made_up_state(config))
    with Checkpoints(tmp_path, config, "text") as checkpoints:
        checkpoints._opened.save(1, OldState(*state[:5]), custom_metadata={"clock": {"seconds": 2.0}})
        again, clock = checkpoints.load(state)
    assert again.biases == {} and clock == {"seconds": 2.0}
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_run_evaluates_and_saves_what_its_steps_made_of_them(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, checkpoint_every=0))
    seen = []

    def step(state, batch, key):
        new = state._replace(step=state.step + 1, biases=jax.tree.map(lambda b: b + 1, state.biases))
        return new, {name: jnp.int32(0) for name in ("loss", "skipped", "bad_in_a_row")}

    def evaluate(_, params, *others):
        seen.append(params)
        names = ("val_loss", "val_dropped_fraction", "val_dropped_floor", "val_max_vio")
        return dict.fromkeys(names, 0.0) | {"val_loss_by_domain": {}}

    monkeypatch.setattr(running, "make_train_step", lambda *_: step)
    monkeypatch.setattr(running, "evaluate", evaluate)
    run_training(short, "runs", display="quiet")
    params, _ = load_params(run_folder(short, "runs"))
    jax.tree.map(np.testing.assert_array_equal, seen[-1], params)
    np.testing.assert_array_equal(bias_of(split_weights(params, "all")[2]), np.full((1, 4), 2.0))


def test_the_biases_of_an_encoder_get_the_loads_of_its_layers_which_come_first():
    biases = {"blocks": {"bias_E": jnp.zeros((1, 2))}, "encoder": {"blocks": {"bias_E": jnp.zeros((2, 2))}}}
    load_LE = jnp.array([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0]])
    moved = _move_biases(biases, load_LE, 0.5)
    np.testing.assert_array_equal(moved["encoder"]["blocks"]["bias_E"], [[-0.5, 0.5], [0.5, -0.5]])
    np.testing.assert_array_equal(moved["blocks"]["bias_E"], [[-0.5, 0.5]])


def test_parting_and_joining():
    tree = {"a": {"bias_E": 1, "w_DE": 2}, "b": {"c": {"w_DE": 3}}, "bias_E": 4}
    weights, frozen, biases = split_weights(tree, "all")
    assert (
        frozen == {}
        and weights == {"a": {"w_DE": 2}, "b": {"c": {"w_DE": 3}}}
        and biases
        == {
            "a": {"bias_E": 1},
            "bias_E": 4,
        }
    )
    assert join(weights, biases) == join(biases, weights) == tree and join(weights, {}) == weights
