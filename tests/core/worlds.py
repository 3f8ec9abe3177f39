"""Small random layers for the tests, and the way from switchmoe's arrays to the oracle's."""

import jax
import jax.numpy as jnp
import numpy as np

import switchmoe as sm
from switchmoe.experts import ExpertParams
from switchmoe.layer import MoEParams
from switchmoe.routing.base import Routing

from . import oracle

# Outside of jit each operation is compiled by itself, which takes five times as long.
moe = jax.jit(sm.moe, static_argnames=("config", "train", "shard"))
moe_with_trace = jax.jit(sm.moe_with_trace, static_argnames=("config", "train", "shard"))
summarize = jax.jit(sm.summarize)
assign_slots = jax.jit(sm.assign_slots, static_argnames=("capacity", "drop_order"))


def make_params(seed, *, d_model=4, d_ff=5, experts=3, gated=False, router_scale=1.5):
    """Parameters large enough that the router has opinions and every activation bends."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=0.7):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    router_DE = normal(d_model, experts, scale=router_scale)
    w_in, w_out = normal(experts, d_model, d_ff), normal(experts, d_ff, d_model)
    gate = normal(experts, d_model, d_ff) if gated else None
    return MoEParams(router_DE, ExpertParams(w_in_EDF=w_in, w_out_EFD=w_out, w_gate_EDF=gate))


def make_x(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed + 1000).standard_normal(shape), jnp.float32)


def make_config(**changes):
    """A config of the size that make_params makes, unless said otherwise."""
    sizes = dict(d_model=4, d_ff=5, num_experts=3)
    if changes.get("top_k", 1) > 1:
        sizes["router"] = "top_k"
    return sm.MoEConfig(**(sizes | changes))


def make_routing(gates, k, mask=None):
    """A Routing that chooses by the given gates, as a router would have; leading axes are free."""
    gates = np.asarray(gates, np.float32)
    rows = gates.reshape(-1, gates.shape[-1])
    expert = np.array([oracle.best(row, k) for row in rows], np.int32).reshape(gates.shape[:-1] + (k,))
    mask = np.ones(gates.shape[:-1], bool) if mask is None else np.asarray(mask, bool)
    return Routing(
        jnp.asarray(expert),
        jnp.asarray(np.take_along_axis(gates, expert, -1)),
        jnp.log(jnp.asarray(gates) + 1e-30),
        jnp.asarray(gates),
        jnp.asarray(mask),
    )


def ask_oracle(params, x_GTD, *, config, capacity, mask_GT=None):
    """The oracle's answer for switchmoe's parameters, in float64."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return oracle.layer(
        np.asarray(x_GTD, np.float64),
        wide.router,
        *wide.experts[:3],  # the oracle has no scales of rounded weights
        k=config.top_k,
        capacity=capacity,
        drop_order=config.drop_order,
        renormalize=config.renormalize,
        activation=config.activation,
        mask_GT=None if mask_GT is None else np.asarray(mask_GT),
        sequences_per_group=config.sequences_per_group,
    )


def seats_of(plan):
    """{(expert, seat): token} of one group's plan; an empty seat names token T."""
    tokens = plan.kept_GTK.shape[-2]
    table = np.asarray(plan.token_GEC)
    return {(e, c): int(table[e, c]) for e, c in np.ndindex(table.shape) if table[e, c] != tokens}


def assert_close_to_peak(actual, expected, tolerance=1e-5, name=""):
    """Every entry within `tolerance` of the largest expected entry: small ones cannot hide, nor cry wolf."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    peak = np.max(np.abs(expected), initial=1e-30)
    worst = np.max(np.abs(actual - expected), initial=0.0)
    assert worst <= tolerance * peak, f"{name}: off by {worst:.3g}, peak {peak:.3g}"


def assert_trees_close(actual, expected, tolerance=1e-5):
    left, right = jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert_close_to_peak(a, b, tolerance, jax.tree_util.keystr(path))
