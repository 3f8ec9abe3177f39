"""What a later token can change for an earlier one: for every router, drop order, overflow and dispatch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.routing import ROUTERS, make_router

from .routers import D_MODEL, TRAITS, Traits, ids_of, traits_of
from .worlds import make_config, make_x

SEEDS, TOKENS, CUT = 16, 8, 2
# As many seats as run out, but not before the cut: 8 tokens with two choices each, 3 experts with 3 seats.
SCARCE = dict(expert_capacity=3)
NEXT = "next choice, token order"
WAYS = {
    "token order": SCARCE | dict(drop_order="token"),
    "choice order": SCARCE | dict(drop_order="choice"),
    "priority": SCARCE | dict(drop_order="priority"),
    NEXT: SCARCE | dict(overflow="next", drop_order="token"),
    "next choice, choice order": SCARCE | dict(overflow="next", drop_order="choice"),
    "dropless": dict(dispatch="dropless", drop_order="priority"),
    "as it comes": dict(),
}


def build(name, way):
    """The config, or None if the router refuses this way of going about it."""
    options = TRAITS.get(name, Traits()).variants[0]
    config = make_config(router=name, init_scale=40.0, **(options | WAYS[way]))
    try:
        make_router(config)
    except ValueError as refusal:
        assert any(word in str(refusal) for word in ("overflow", "dropless", "expert_capacity")), refusal
        return None
    return config


def should_leak(config):
    if make_router(config).leak:
        return True
    if config.dispatch == "dropless":
        return False
    # In choice order every later first choice is seated before an earlier second one.
    return config.drop_order == "priority" or (config.drop_order == "choice" and config.top_k > 1)


@functools.partial(jax.jit, static_argnames="config")
def run(params, x_NTD, config):
    """Each row by itself, and all with the same noise: only what stands in the row makes a difference."""

    def row(x):
        ids = ids_of(x[None])[0]
        return sm.moe(params, x, config, train=True, key=jax.random.key(7), token_ids=ids)[0]

    return jax.vmap(row)(x_NTD)


def earlier_tokens_change(config):
    """Whether new tokens after the cut change any output before it, in any of the rows."""
    params = sm.init_moe(jax.random.key(1), config)
    x = make_x(6, SEEDS, TOKENS, D_MODEL)
    later = x.at[:, CUT:].set(2 * make_x(7, SEEDS, TOKENS - CUT, D_MODEL))
    y, other = jnp.split(run(params, jnp.concatenate([x, later]), config), 2)
    assert bool((y[:, CUT:] != other[:, CUT:]).any())
    assert float(jnp.abs(y[:, :CUT]).max()) > 0
    return bool((y[:, :CUT] != other[:, :CUT]).any())


@pytest.mark.parametrize("name", ROUTERS)
def test_later_tokens_change_earlier_ones_only_where_it_is_said(name):
    said = make_router(build(name, "as it comes")).leak
    ways = [way for way in WAYS if (way == "as it comes") == bool(said)]
    ways += ["dropless"] * bool(said)  # what a router leaks, no dispatch makes good
    tried = 0
    for way in ways:
        config = build(name, way)
        if config is None or (config.overflow == "next" and way != NEXT and name != "top_k"):
            continue  # how full experts send tokens on does not depend on the router
        tried += 1
        expected = should_leak(config)
        if traits_of(config).blind and config.router != "hash" and way == "choice order":
            expected = False  # what the tokens are does not move its choices, so nothing shows
        assert earlier_tokens_change(config) == expected, way
    assert tried >= (1 if said else 4)


def test_with_one_choice_the_next_is_taken_without_looking_ahead():
    # With k = 1 choice order is token order, and so is the order in which full experts send tokens on.
    for drop_order in ("choice", "token", "priority"):
        config = make_config(overflow="next", drop_order=drop_order, init_scale=40.0, **SCARCE)
        assert earlier_tokens_change(config) == (drop_order == "priority")


def test_a_leak_is_said_in_words():
    leaks = {name: make_router(build(name, "as it comes")).leak for name in ROUTERS}
    leaking = {name for name, leak in leaks.items() if leak}
    assert leaking == {"expert_choice", "soft_moe", "sinkhorn", "base"} & set(ROUTERS)
    assert all(len(leaks[name].split()) > 4 and not leaks[name].endswith(".") for name in leaking)
    np.testing.assert_array_equal([leaks[name] for name in set(ROUTERS) - leaking], "")
