"""Rules and layouts: where each dimension goes, and a sentence for what does not divide or suit a layer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import switchmoe as sm
from switchmoe.parallel import Layout, Rules, check_divides, make_mesh, moe
from tests.checks import unchecked
from tests.parallel.described import eight


def test_rules_say_where_each_dimension_goes():
    rules = Rules()
    assert rules.weight("EDF") == PartitionSpec("expert", "fsdp", "tensor")
    assert rules.weight("EFD", 2) == PartitionSpec(None, None, "expert", "tensor", "fsdp")
    assert rules.weight("DHA") == rules.weight("DNA") == PartitionSpec("fsdp", "tensor", None)
    assert rules.weight("VD") == PartitionSpec(None, "fsdp")
    assert rules.activation("BSD") == PartitionSpec(("data", "fsdp", "expert"), None, None)
    assert rules.activation("BSHA") == PartitionSpec(("data", "fsdp", "expert"), None, "tensor", None)
    assert Rules(vocabulary="tensor").weight("VD") == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(heads="head"), "Rules.heads is 'head', which is no mesh axis; choose one of ('data'"),
        (dict(rows=("data", "data", "expert")), "Rules.rows is ('data', 'data', 'expert'), but needs diff"),
        (dict(rows=("data", "row")), "Rules.rows is ('data', 'row'), but needs different axes out of"),
        (dict(experts="tensor", hidden=None), "Rules.experts is 'tensor', which is not in Rules.rows"),
        (dict(rows=("data", "expert")), "Rules.model is 'fsdp', which is not in Rules.rows"),
        (dict(model="expert"), "dimensions of a weight [E, D, F] over the axis 'expert', experts and model;"),
        (dict(hidden="fsdp"), "Rules split two dimensions of a weight [E, D, F] over the axis 'fsdp', model"),
        (
            dict(heads="data"),
            "dimensions of an activation [B, S, H, A] over the axis 'data', rows and heads;",
        ),
        (dict(vocabulary="fsdp"), "two dimensions of a weight [V, D] over the axis 'fsdp', vocabulary and"),
    ],
)
def test_rules_that_collide_are_refused_when_they_are_made(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Rules(**fields)


def layout_of(*sizes, **how):
    return Layout(make_mesh(*sizes, devices=eight()), **how)


def test_a_layout_leaves_axes_of_one_device_out():
    layout = layout_of(2, 1, 2, 2)
    assert layout.batch_spec() == PartitionSpec(("data", "expert"))
    assert layout.weight_spec("EDF", 1) == PartitionSpec(None, "expert", None, "tensor")
    assert layout_of(8, 1, 1, 1).weight_spec("EDF") == PartitionSpec(None, None, None)
    assert layout_of(1, 1, 1, 8).batch_spec() == PartitionSpec(None)
    assert layout.sharding(layout.batch_spec()).mesh == layout.mesh
    assert (layout.size("expert"), layout.size(("data", "tensor")), layout.size(None)) == (2, 4, 1)


def test_layouts_are_compared_by_what_they_say():
    devices = eight()
    one, other = (Layout(make_mesh(2, 1, 4, 1, devices=devices), executor="all_gather") for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != Layout(one.mesh) and one != Layout(one.mesh, Rules(vocabulary="tensor"), "all_gather")
    for how in (dict(executor="sideways"), dict(chunks=0), dict(ragged_buffer_factor=-1.0)):
        with unchecked(), pytest.raises(ValueError, match=f"{next(iter(how))}.* (known|must be)"):
            Layout(one.mesh, **how)
    with pytest.raises(ValueError, match=r"has the axes \('rows',\), but a layout needs .*make_mesh"):
        Layout(Mesh(np.array(eight()), ("rows",)))


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_activations_are_kept_split_inside_and_outside_of_jit(axis_types):
    layout = Layout(make_mesh(1, 1, 1, 1, axis_types=axis_types))
    x = jnp.arange(8.0).reshape(2, 2, 2)
    for constrain in (layout.constrain, jax.jit(layout.constrain, static_argnums=1)):
        np.testing.assert_array_equal(constrain(x, "BSD"), x)


CONFIG = sm.MoEConfig(d_model=8, d_ff=12, num_experts=8)
X = jnp.ones((16, 4, 8))


@pytest.mark.parametrize(
    "sizes, changes, how, sentence",
    [
        ((1, 1, 8, 1), dict(num_experts=6), {}, "num_experts=6 does not divide over 8 devices (expert 8);"),
        ((1, 8, 1, 1), dict(d_model=12), {}, "d_model=12 does not divide over 8 devices (fsdp 8); change it"),
        ((1, 1, 1, 8), {}, {}, "d_ff=12 does not divide over 8 devices (tensor 8); change it, or the mesh"),
        (
            (2, 2, 2, 1),
            dict(sequences_per_group=4),
            {},
            "16 rows do not divide over 8 devices (data 2 x fsdp 2 x expert 2) in groups of "
            "sequences_per_group=4; make them a multiple of 32, or take a smaller mesh.",
        ),
        ((8, 1, 1, 1), {}, dict(chunks=4), "chunks=4 does not divide the 2 groups of a device; lower chunks"),
        ((2, 1, 4, 1), dict(dispatch="dropless"), dict(chunks=2), "chunks=2 cuts groups that have seats of"),
        (
            (2, 1, 4, 1),
            dict(dispatch="dropless"),
            dict(executor="all_to_all"),
            "executor='all_to_all' carries seats, and dispatch='dropless' has none; choose",
        ),
        (
            (2, 1, 4, 1),
            dict(dispatch="einsum"),
            dict(executor="ragged_all_to_all"),
            "executor='ragged_all_to_all' carries dropless rows, but dispatch='einsum'; choose",
        ),
    ],
)
def test_a_layer_that_does_not_fit_its_mesh_gets_one_sentence(sizes, changes, how, sentence):
    config = sm.MoEConfig(**(vars(CONFIG) | changes))
    params = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct((16, 4, config.d_model), jnp.float32)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        jax.eval_shape(lambda params, x: moe(params, x, config, layout=layout_of(*sizes, **how)), params, x)


def test_a_layer_on_a_mesh_needs_one_mesh_and_whole_groups():
    params = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), CONFIG))
    layout = layout_of(2, 1, 4, 1)
    for where in (dict(), dict(layout=layout, mesh=layout.mesh)):
        with pytest.raises(ValueError, match="needs a mesh or a layout that has one, and not both"):
            jax.eval_shape(lambda params, where=where: moe(params, X, CONFIG, **where), params)
    with pytest.raises(ValueError, match="which is one group, and a group can't be split"):
        jax.eval_shape(lambda params: moe(params, X[0], CONFIG, layout=layout), params)
    with pytest.raises(ValueError, match="x has shape .* but must end in .* d_model=8"):
        jax.eval_shape(lambda params: moe(params, X[..., :4], CONFIG, layout=layout), params)
    check_divides("num_heads=8", 8, layout, layout.rules.heads)
    with pytest.raises(ValueError, match=re.escape("num_heads=6 does not divide over 4 devices (tensor 4);")):
        check_divides("num_heads=6", 6, layout_of(2, 1, 1, 4), Rules().heads)
