"""A trace of routing: kept in a file, and replayed so that another pass makes the same choices."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.layer import Trace
from switchmoe.trace import RouterTrace, load_trace, save_trace
from tests.checks import unchecked
from tests.models.worlds import DENSE, SPARSE, abstract_params, some_ids

# Two sparse layers with noise in the router; in training tokens are dropped.
CONFIG = dataclasses.replace(
    SPARSE,
    num_layers=2,
    moe_every=1,
    moe=dataclasses.replace(SPARSE.moe, router="top_k", top_k=2, renormalize=True, jitter=0.3),
)
KEY = jax.random.key(3)
SHAPE = (2, 4, 24, 2)
IDS = some_ids()


@functools.cache
def some_params():
    """(graphdef, params) with numbers made up, since drawing them takes longer than the tests."""
    graphdef, shapes = abstract_params(CONFIG)
    draw = np.random.default_rng(0).normal
    return graphdef, jax.tree.map(lambda leaf: jnp.asarray(draw(0, 0.3, leaf.shape), jnp.float32), shapes)


@jax.jit
def record(params):
    """A training pass with noise: logits and trace."""
    logits, _, trace = nnx.merge(some_params()[0], params).trace(IDS, train=True, key=KEY)
    return logits, trace


@jax.jit
def replay(params, expert_LBSK, key):
    """The same pass with the choices given: the gradient of some sum of logits, logits and trace."""

    def total(params):
        model = nnx.merge(some_params()[0], params)
        logits, _, trace = model.trace(IDS, train=True, key=key, replay=expert_LBSK)
        return jnp.sum(jnp.sin(logits)), (logits, trace)

    gradient, (logits, trace) = jax.grad(total, has_aux=True)(params)
    return gradient, logits, trace


def perturbed(params):
    noise = lambda leaf: leaf + 1e-3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    return jax.tree.map(noise, params)


def test_a_replayed_training_pass_is_the_recorded_one():
    params = some_params()[1]
    logits, trace = record(params)
    assert isinstance(trace, RouterTrace) and not np.asarray(trace.kept_LBSK).all()
    _, again, same = replay(params, trace.expert_LBSK, KEY)
    np.testing.assert_array_equal(again, logits)
    jax.tree.map(np.testing.assert_array_equal, same, trace)


def test_replay_fixes_choices_where_weights_and_noise_are_others_and_the_router_learns():
    params = some_params()[1]
    trace = record(params)[1]
    others = perturbed(params)
    assert not np.array_equal(record(others)[1].expert_LBSK, trace.expert_LBSK)  # else nothing is shown
    gradient, _, same = replay(others, trace.expert_LBSK, jax.random.key(4))
    np.testing.assert_array_equal(same.expert_LBSK, trace.expert_LBSK)
    assert not np.array_equal(same.weight_LBSK, trace.weight_LBSK)
    router_LDE = gradient["blocks"]["layer_0"]["feed_forward"]["router_DE"][...]
    assert np.isfinite(router_LDE).all() and (np.abs(router_LDE).max(axis=(1, 2)) > 1e-4).all()


def test_inference_can_be_held_to_what_training_chose_through_a_file(tmp_path):
    graphdef, params = some_params()
    trace = record(params)[1]
    save_trace(tmp_path / "step.npz", trace, num_experts=4)
    assert os.listdir(tmp_path) == ["step.npz"]
    loaded = load_trace(tmp_path / "step.npz", num_experts=4, shape=SHAPE)
    jax.tree.map(np.testing.assert_array_equal, loaded, trace)
    assert [part.dtype for part in loaded] == [jnp.int32, jnp.float32, jnp.bool_]

    @jax.jit
    def infer(expert_LBSK):
        model = nnx.merge(graphdef, params)
        return model.trace(IDS)[2], model.trace(IDS, replay=expert_LBSK)[2], model(IDS, replay=expert_LBSK)[1]

    free, held, aux = infer(loaded.expert_LBSK)
    assert not np.array_equal(free.expert_LBSK, trace.expert_LBSK)  # no noise here
    np.testing.assert_array_equal(held.expert_LBSK, trace.expert_LBSK)
    assert np.asarray(held.kept_LBSK).all()  # and seats enough
    load_LE = [np.bincount(np.ravel(layer), minlength=4) for layer in trace.expert_LBSK]
    np.testing.assert_array_equal(aux.load_E, load_LE)


def test_a_trace_of_other_rows_layers_or_choices_is_refused():
    graphdef, params = some_params()

    def run(shape, graphdef=graphdef, params=params):
        with unchecked():
            jax.eval_shape(lambda p: nnx.merge(graphdef, p)(IDS, replay=jnp.zeros(shape, jnp.int32)), params)

    for shape in [(1, 4, 24, 2), (2, 3, 24, 2), (2, 4, 23, 2), (2, 4, 24, 1)]:
        with pytest.raises(ValueError, match=r"replay has shape .* choices\] = \[2, 4, 24, 2\]; replay a"):
            run(shape)
    with pytest.raises(ValueError, match="dense, so it has no routing to replay"):
        run(SHAPE, *abstract_params(DENSE))


def small_trace(num_experts=5):
    """One layer's trace, made one of a model; expert `num_experts` is a choice not used."""
    expert = jnp.array([[[0, num_experts], [num_experts - 1, 1]]])
    layer = Trace(expert, jnp.array([[[0.5, 0.0], [0.25, 0.125]]]), expert < num_experts)
    return RouterTrace(*(part[None] for part in layer))


@pytest.mark.parametrize("num_experts, stored", [(5, np.int16), (32767, np.int16), (32768, np.int32)])
def test_experts_are_stored_as_small_as_they_fit(tmp_path, num_experts, stored):
    trace = small_trace(num_experts)
    save_trace(tmp_path / "trace", trace, num_experts=num_experts)  # no .npz is added
    with np.load(tmp_path / "trace") as arrays:
        assert arrays["expert_LBSK"].dtype == stored and arrays["weight_LBSK"].dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, load_trace(tmp_path / "trace"), trace)


def test_a_file_of_something_else_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, small_trace(), num_experts=5)
    with pytest.raises(ValueError, match="layers with 5 experts, but these have 6; replay it in the model"):
        load_trace(path, num_experts=6)
    with pytest.raises(ValueError, match=r"= \[1, 1, 2, 2\], but \[1, 2, 2, 2\] is asked for; replay it"):
        load_trace(path, shape=(1, 2, 2, 2))
    for content in (b"", b"PK", path.read_bytes()[:-40], b"text"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="other is not a router trace"):
            load_trace(tmp_path / "other")
    np.savez(tmp_path / "other.npz", expert_LBSK=np.array([object()]))
    with pytest.raises(ValueError, match="is not a router trace"):
        load_trace(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="is not a router trace"):
        load_trace(tmp_path / "absent.npz")
    with np.load(path) as arrays:
        np.savez(tmp_path / "newer.npz", **dict(arrays) | {"format": np.int32(2)})
    with pytest.raises(ValueError, match="of format 2, but this version reads 1"):
        load_trace(tmp_path / "newer.npz")


def test_a_trace_that_could_not_be_replayed_is_not_saved_and_harms_no_older_one(tmp_path, monkeypatch):
    path, trace = tmp_path / "trace.npz", small_trace()
    save_trace(path, trace, num_experts=5)
    with pytest.raises(ValueError, match="names experts 0 to 5, but num_experts is 4; pass"):
        save_trace(path, trace, num_experts=4)
    with pytest.raises(ValueError, match=r"shapes \(1, 1, 2, 2\), \(1, 1, 2, 2\), \(1, 2, 2\), but all"):
        save_trace(path, trace._replace(kept_LBSK=trace.kept_LBSK[0]), num_experts=5)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_trace(path, trace, num_experts=99)
    jax.tree.map(np.testing.assert_array_equal, load_trace(path, num_experts=5), trace)
