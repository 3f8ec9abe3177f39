"""The model under grad, remat, vmap and a growing depth; its state as a plain tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.models import dense_twin
from switchmoe.nn import rematerialize
from tests.models.worlds import (
    DENSE,
    SPARSE,
    abstract_params,
    count_equations,
    loss_of,
    model_of,
    params_of,
    run,
    some_ids,
)

NAMES = ("none", "full", "dots", "all_dots")
SHALLOW = dataclasses.replace(SPARSE, num_layers=2, moe_every=1)  # half as much to compile


def gradients(config, ids, **options):
    graphdef, params = params_of(config)
    return jax.jit(jax.value_and_grad(loss_of(graphdef, config, ids, **options)))(params)


def test_gradients_are_finite_and_reach_every_weight():
    config = dataclasses.replace(
        SPARSE,
        gated=True,
        tie_embeddings=False,
        moe=dataclasses.replace(SPARSE.moe, gated=True, activation="silu", capacity_factor=2.0),
    )
    loss, grads = gradients(config, some_ids())
    assert np.isfinite(loss)
    flat = nnx.to_flat_state(grads)
    assert {"router_DE", "w_gate_EDF", "w_gate_DF", "head_DV", "scale_D"} <= {path[-1] for path, _ in flat}
    for path, leaf in flat:
        grad = np.asarray(leaf[...])
        assert np.isfinite(grad).all(), path
        # Stacked weights carry super-blocks in front: every one of them must be reached.
        rows = grad.reshape(grad.shape[0] if path[0] == "blocks" else 1, -1)
        assert (np.abs(rows).max(axis=1) > 0).all(), path


def test_remat_policies_change_no_number():
    ids = some_ids()
    want_loss, want = gradients(SHALLOW, ids)
    for name in NAMES[1:]:
        loss, grads = gradients(dataclasses.replace(SHALLOW, remat=name), ids)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, want)


def test_remat_policies_keep_less_and_less():
    """The backward pass of "full" holds the fewest values of the forward pass, "none" the most."""
    ids = some_ids()

    def kept(name):
        graphdef, params = abstract_params(dataclasses.replace(SPARSE, remat=name))
        loss = loss_of(graphdef, SPARSE, ids)
        backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    sizes = {name: kept(name) for name in NAMES}
    assert sizes["full"] < sizes["dots"] < sizes["all_dots"] < sizes["none"], sizes


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dots'"):
        rematerialize(abs, "dot")
    with pytest.raises(ValueError, match="did you mean 'full'"):
        dataclasses.replace(SPARSE, remat="ful")


def test_depth_does_not_grow_the_program():
    ids = some_ids()

    def program(num_super_blocks):
        config = dataclasses.replace(SPARSE, num_layers=2 * num_super_blocks)
        graphdef, params = abstract_params(config)
        step = jax.value_and_grad(loss_of(graphdef, config, ids))
        return count_equations(jax.make_jaxpr(step)(params).jaxpr)

    assert program(2) == program(8) > 100


def test_it_vmaps_over_models():
    ids = some_ids(rows=2)
    graphdef, first = params_of(DENSE)
    second = params_of(DENSE, seed=1)[1]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    logits = jax.vmap(lambda params: nnx.merge(graphdef, params)(ids)[0])(both)
    np.testing.assert_allclose(logits[0], run(DENSE, ids)[0], atol=2e-6)
    np.testing.assert_allclose(logits[1], run(DENSE, ids, params=second)[0], atol=2e-6)


def test_the_state_is_a_plain_tree_of_params():
    model = model_of(SPARSE)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert all(type(leaf) is nnx.Param for _, leaf in nnx.to_flat_state(params))
    pure = nnx.to_pure_dict(params)
    assert all(
        isinstance(key.key, str) for path, _ in jax.tree_util.tree_leaves_with_path(pure) for key in path
    )

    saved = jax.tree.map(np.asarray, pure)
    other = model_of(SPARSE, seed=1)
    ids = some_ids()
    assert not np.allclose(run(SPARSE, ids, params=nnx.state(other))[0], run(SPARSE, ids)[0])
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, saved))
    nnx.update(other, state)
    np.testing.assert_array_equal(run(SPARSE, ids, params=nnx.state(other))[0], run(SPARSE, ids)[0])


def weights(config, seed=0):
    flat = nnx.to_flat_state(params_of(config, seed)[1])
    return {".".join(path): np.asarray(leaf[...]) for path, leaf in flat}


def test_a_weight_does_not_depend_on_the_others():
    base = weights(SPARSE)
    again = weights(dataclasses.replace(SPARSE, rope_theta=10.0))
    deeper = weights(dataclasses.replace(SPARSE, num_layers=8))
    untied = weights(dataclasses.replace(SPARSE, tie_embeddings=False))
    twin = weights(dense_twin(SPARSE))
    assert set(untied) - set(base) == {"head_DV"}
    for name, value in base.items():
        np.testing.assert_array_equal(value, again[name])
        np.testing.assert_array_equal(value, untied[name])
        np.testing.assert_array_equal(value, deeper[name][:2] if name.startswith("blocks") else deeper[name])
        if "layer_1.feed_forward.w" not in name and "router" not in name:
            np.testing.assert_array_equal(value, twin[name])
    seeds = weights(SPARSE, seed=1)
    drawn = [name for name in base if "norm" not in name]
    assert not any(np.array_equal(base[name], seeds[name]) for name in drawn)
    # No two weights, and no two super-blocks, share their numbers.
    heads = [
        row.ravel()[:4].tobytes()
        for name in drawn
        for row in (base[name] if "blocks" in name else [base[name]])
    ]
    assert len(set(heads)) == len(heads)
