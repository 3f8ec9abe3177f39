"""Runs that start from given weights, train a part of them, and listen to a teacher."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.data import ByteTokenizer, batches, load_packed, make_batch
from switchmoe.train import Teacher, TuneConfig, fingerprint, load_params, run_folder, run_training
from switchmoe.train.config import from_json, to_json
from switchmoe.train.given import Given, with_given
from switchmoe.train.gradient import make_gradient
from switchmoe.train.model import PureModel, adapted_model, join, pure_model
from switchmoe.train.parts import split_weights
from switchmoe.train.step import init_state, make_train_step
from tests.quick import compiled_quickly

from .worlds import made_up_state, small_config


def one_layer(config, **changes):
    """The same run of a model of one layer, which is soon compiled."""
    model = dataclasses.replace(config.model, num_layers=1, moe_every=1, **changes)
    return dataclasses.replace(config, model=model)


def tuned(config, **tune):
    return dataclasses.replace(config, tune=TuneConfig(**tune))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def names(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What is compiled here hardly runs."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of adapters, from given weights, with a dense teacher; checkpoints of its steps 2 and 4."""
    place = tmp_path_factory.mktemp("finished")
    config = one_layer(small_config(place, steps=4, log_every=1, checkpoint_every=2, eval_batches=1))
    start = made_up_state(config).everything()
    dense = one_layer(config, moe=None, d_ff=16)
    teacher = Teacher(made_up_state(dense).params, dense.model)
    config = tuned(config, part="lora", lora_rank=2)
    kept = jax.tree.map(np.copy, start)
    result = run_training(config, place / "runs", start=start, teacher=teacher, display="quiet")
    same(start, kept)  # what is given is not worked in
    return config, Given(start, teacher), result, place


def test_a_run_has_a_name_of_its_own_by_what_it_is_given(finished):
    config, given, result, place = finished
    whole = with_given(config, given)
    assert result.folder == run_folder(whole, place / "runs")
    assert whole.tune.weights == fingerprint(given.start)
    assert len(whole.tune.teacher) == 16 and from_json(to_json(whole)) == whole
    start, teacher = given
    bent = join(start, {"final_norm": {"scale_D": start["final_norm"]["scale_D"] + 1e-6}})
    others = [
        Given(),
        Given(start),
        Given(bent, teacher),
        Given(start, teacher._replace(config=dataclasses.replace(teacher.config, rope_theta=1.0))),
    ]
    folders = {run_folder(with_given(config, other), ".") for other in others}
    assert len(folders | {run_folder(whole, ".")}) == 5
    again = run_training(config, place / "runs", start=start, teacher=teacher, display="quiet")
    assert again.status == "already done"


def test_only_the_adapters_moved_and_a_model_is_loaded_with_them_merged(finished):
    _, given, result, _ = finished
    params, saved = load_params(result.folder)
    assert saved.tune.part == "lora" and names(params) == names(given.start)
    moved = {
        jax.tree_util.keystr(path)
        for path, one in jax.tree.leaves_with_path(params)
        if not np.array_equal(one, dict(jax.tree.leaves_with_path(given.start))[path])
    }
    expert = "['blocks']['layer_0']['feed_forward']"
    assert moved == {f"{expert}['w_in_EDF']", f"{expert}['w_out_EFD']"}
    layer, was = (tree["blocks"]["layer_0"]["feed_forward"] for tree in (params, given.start))
    change_DF = np.asarray(layer["w_in_EDF"] - was["w_in_EDF"])[0, 0]
    assert np.linalg.matrix_rank(change_DF, tol=1e-4 * np.abs(change_DF).max()) == 2


def test_what_was_stopped_goes_on_to_the_same_bits(finished):
    config, (start, teacher), result, place = finished
    other = place / "other"
    shutil.copytree(place / "runs", other)
    folder = other / result.folder.relative_to(place / "runs")
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "done.json").unlink()
    again = run_training(config, other, start=start, teacher=teacher, display="quiet")
    assert (again.status, again.folder) == ("done", folder)
    same(load_params(folder)[0], load_params(result.folder)[0])
    assert again.summary["val_loss"] == result.summary["val_loss"]


@pytest.mark.parametrize("part", ["experts", "rest"])
def test_what_is_frozen_keeps_every_bit_and_has_no_history(part, tmp_path):
    settings = dict(
        moe=dict(bias_step=1e-3, shared_experts=1), optimizer=dict(weight_decay=0.5, warmup_steps=0)
    )
    config = one_layer(small_config(tmp_path, **settings))
    start, model = made_up_state(config).everything(), pure_model(config.model)
    config = tuned(config, part=part)
    trained, frozen, biases = split_weights(start, part)
    assert names(join(join(trained, frozen), biases)) == names(start)
    layer = "['blocks']['layer_0']['feed_forward']"
    sparse = {name for name in names(start) if name.startswith(layer)}
    assert len(sparse) == 6  # router, experts, shared experts, bias
    if part == "experts":
        assert names(trained) == sparse - {f"{layer}['bias_E']"} and names(biases) == {f"{layer}['bias_E']"}
    else:
        assert names(frozen) == sparse and biases == {}
    state = jax.jit(lambda: init_state(config, model, start))()
    same(state.everything(), start)
    history = names(state.opt_state)
    assert not [name for name in history for still in names(frozen) if name.endswith(still)]
    assert [name for name in history for moving in names(trained) if name.endswith(moving)]
    batch = batches(load_packed(config.data).train, 4, seed=0)[0]
    after, _ = jax.jit(make_train_step(config, model))(state, batch, jax.random.key(0))
    same(after.frozen, frozen)
    for tree, was in ((after.params, trained), (after.biases, biases)):
        assert all(
            not np.array_equal(one, dict(jax.tree.leaves_with_path(was))[path])
            for path, one in jax.tree.leaves_with_path(tree)
        )


def test_adapters_are_the_model_itself_before_the_first_step(tmp_path):
    config = tuned(one_layer(small_config(tmp_path)), part="lora")
    start, plain = made_up_state(config).everything(), pure_model(config.model)
    adapted = adapted_model(plain, config.tune)
    state = jax.jit(lambda: init_state(config, adapted, start))()
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(state.params)} == {
        "w_in_down_EDJ", "w_in_up_EJF", "w_out_down_EFJ", "w_out_up_EJD",
    }  # fmt: skip
    same(state.frozen, start)
    ids_BS = jnp.arange(64).reshape(2, 32)
    want_BSV, _ = jax.jit(plain.apply)(start, ids_BS)
    found_BSV, _ = jax.jit(adapted.apply)(state.everything(), ids_BS)
    np.testing.assert_allclose(found_BSV, want_BSV, atol=1e-6 * float(jnp.abs(want_BSV).max()))


def test_the_loss_of_a_student_by_hand(tmp_path):
    """Logits are a table's rows times a matrix; the gradient is then x (p - 3/4 one-hot - 1/4 q)."""
    table_VD = np.random.default_rng(0).normal(size=(259, 6)).astype(np.float32)
    student_DV, teacher_DV = (np.random.default_rng(n).normal(size=(6, 259)) for n in (1, 2))
    calls = []

    def apply(params, ids_BS, *, train, key=None, **_):
        calls.append((train, key is None))
        return jnp.asarray(table_VD)[ids_BS] @ params["w_DV"], None

    model = PureModel(lambda key: {}, apply, lambda params: None)
    rows = np.random.default_rng(3).integers(3, 259, (4, 9)).astype(np.uint16)
    rows[:, 5] = ByteTokenizer.eos  # the end of a document, behind which nothing is predicted
    batch = make_batch(rows, np.zeros(4, np.uint8))
    config = small_config(tmp_path, batch_size=4, accumulate=2)
    params = ({"w_DV": jnp.asarray(w, jnp.float32)} for w in (student_DV, teacher_DV))
    run = jax.jit(make_gradient(config, model, model))
    student, teacher = params
    (loss, (hard, _)), gradient = run(student, {}, batch, jax.random.key(0), teacher)
    assert set(calls) == {(True, False), (False, True)}  # the teacher evaluates

    x_ND = table_VD[batch.ids_BS].reshape(-1, 6).astype(np.float64)
    weight_N = batch.weight_BS.reshape(-1) / batch.weight_BS.sum()
    assert 0 < (weight_N == 0).sum() < len(weight_N)

    def probabilities(w_DV):
        e_NV = np.exp(x_ND @ np.float32(w_DV))
        return e_NV / e_NV.sum(-1, keepdims=True)

    p_NV, q_NV = probabilities(student_DV), probabilities(teacher_DV)
    one_hot_NV = np.eye(259)[batch.targets_BS.reshape(-1)]
    wanted_NV = 0.75 * one_hot_NV + 0.25 * q_NV
    np.testing.assert_allclose(hard, -(weight_N[:, None] * one_hot_NV * np.log(p_NV)).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss, -(weight_N[:, None] * wanted_NV * np.log(p_NV)).sum(), rtol=1e-5)
    want_DV = x_ND.T @ (weight_N[:, None] * (p_NV - wanted_NV))
    np.testing.assert_allclose(gradient["w_DV"], want_DV, atol=1e-5 * np.abs(want_DV).max())
