"""Updates: which weights decay, what is clipped, and Adafactor as one optimizer a layer and expert."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switchmoe.train import OptimizerConfig
from switchmoe.train.adafactor import scale_by_adafactor
from switchmoe.train.model import pure_model
from switchmoe.train.optimizer import make_optimizer
from switchmoe.train.weights import matrix_mask, stacked_axes

from .worlds import small_model

FACTOR_AT_LEAST = 4


def test_adafactor_is_one_optimizer_for_each_layer_and_expert():
    keys = jax.random.split(jax.random.key(0), 8)
    sizes = jnp.array([1e-3, 1e-1, 1.0, 30.0, 5.0, 0.2]).reshape(
        2, 3, 1, 1
    )  # experts of very different gradients
    params = {
        "w_in_EDF": jax.random.normal(keys[0], (2, 3, 8, 5)) * jnp.sqrt(sizes),
        "router_DE": jax.random.normal(keys[1], (2, 8, 3)),
        "scale_D": jnp.ones((2, 8)),
        "embedding_VD": jax.random.normal(keys[2], (11, 8)),
    }
    ours = optax.chain(scale_by_adafactor(FACTOR_AT_LEAST), optax.scale(-0.01))
    state, new, update_ours = jax.jit(ours.init)(params), params, jax.jit(ours.update)
    # The library's own, alone on each matrix (two layers of three experts, two layers, two layers, one).
    alone = optax.adafactor(0.01, min_dim_size_to_factor=FACTOR_AT_LEAST)
    parts = {
        (name, place): params[name][place]
        for name, stack in {
            "w_in_EDF": (2, 3),
            "router_DE": (2,),
            "scale_D": (2,),
            "embedding_VD": (),
        }.items()
        for place in np.ndindex(*stack)
    }
    states, update_alone = {part: alone.init(weight) for part, weight in parts.items()}, jax.jit(alone.update)
    for key in keys[3:6]:
        gradients = {
            name: jax.random.normal(jax.random.fold_in(key, i), weight.shape)
            for i, (name, weight) in enumerate(params.items())
        }
        gradients["w_in_EDF"] *= sizes
        updates, state = update_ours(gradients, state, new)
        new = optax.apply_updates(new, updates)
        for name, place in parts:
            update, states[name, place] = update_alone(
                gradients[name][place], states[name, place], parts[name, place]
            )
            parts[name, place] = parts[name, place] + update
    for (name, place), weight in parts.items():
        moved = np.abs(weight - params[name][place]).max()
        assert moved > 0
        np.testing.assert_allclose(new[name][place], weight, atol=1e-5 * moved, err_msg=f"{name}{place}")
    # The trap it avoids: on the stacked array, optax's factors lie across experts and layers.
    together, _ = update_alone(gradients["w_in_EDF"], alone.init(params["w_in_EDF"]), params["w_in_EDF"])
    apart, _ = update_ours(gradients, ours.init(params), params)
    assert np.abs(together - apart["w_in_EDF"]).max() > 0.1 * np.abs(together).max()


def test_adafactor_keeps_rows_and_columns_instead_of_whole_second_moments():
    params = {"w_in_EDF": jnp.ones((2, 3, 8, 5))}
    shapes = {leaf.shape for leaf in jax.tree.leaves(scale_by_adafactor(FACTOR_AT_LEAST).init(params))}
    assert (2, 3, 8) in shapes and (2, 3, 5) in shapes and (2, 3, 8, 5) not in shapes


def test_only_matrices_of_a_model_decay():
    shapes = jax.eval_shape(pure_model(small_model()).init, jax.random.key(0))
    flat = jax.tree.leaves_with_path(matrix_mask(shapes))
    decays = {jax.tree_util.keystr(path).split("'")[-2]: bool(decay) for path, decay in flat}
    assert decays == {
        "embedding_VD": True,
        "router_DE": True,
        "w_in_EDF": True,
        "w_out_EFD": True,
        "w_in_DF": True,
        "w_out_FD": True,
        "w_q_DHA": True,
        "w_k_DNA": True,
        "w_v_DNA": True,
        "w_o_HAD": True,
        "scale_D": False,
    }


def test_weight_decay_pulls_matrices_and_leaves_norms():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1)
    optimizer = make_optimizer(config, steps=3)
    params = {"w_in_EDF": jnp.full((2, 3, 4), 2.0), "scale_D": jnp.full((2, 4), 2.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    # No gradient, so what is left is -learning rate * decay * weight = -0.5 * 0.1 * 2.
    np.testing.assert_allclose(updates["w_in_EDF"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale_D"], 0)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_the_gradient_is_clipped_to_its_global_norm(clip, expected):
    # (3, 4) has norm 5. AdamW's first mean, (1 - beta1) times the gradient it was given, shows what came
    # through.
    optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, beta1=0.5), steps=3)
    params = {"a_D": jnp.zeros(1), "b_D": jnp.zeros(1)}
    gradients = {"a_D": jnp.full(1, 3.0), "b_D": jnp.full(1, 4.0)}
    for given in ({}, {"norm": jnp.array(5.0)}):
        _, state = optimizer.update(gradients, optimizer.init(params), params, **given)
        mean = state[1].mu
        np.testing.assert_allclose([2 * mean["a_D"][0], 2 * mean["b_D"][0]], expected, rtol=1e-6)


def test_stacking_axes_come_from_the_name():
    path = jax.tree_util.DictKey
    assert stacked_axes((path("w_in_EDF"),), jnp.zeros((2, 3, 4, 5))) == 2  # super-blocks, experts
    assert stacked_axes((path("w_q_DHA"),), jnp.zeros((2, 3, 4, 5))) == 1  # super-blocks
    assert stacked_axes((path("embedding_VD"),), jnp.zeros((2, 3))) == 0
    with pytest.raises(ValueError, match="kernel.*has no dimensions in its name"):
        stacked_axes((path("kernel"),), jnp.zeros((2, 3)))
