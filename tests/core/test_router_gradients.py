"""Where every router's gradient goes: to its weights and to real tokens, never to the bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.routing import ExpertChoice, Routing, make_router

from .routers import (
    D_MODEL,
    EXPERTS,
    GROUPS,
    MASK,
    TOKENS,
    adds_to_one,
    apply,
    build,
    group_keys,
    make_cases,
    params_of,
    traits_of,
)
from .worlds import assert_close_to_peak, make_x

every_router = pytest.mark.parametrize("case", make_cases(), ids=str)
ruled_router = pytest.mark.parametrize("case", make_cases(lambda traits: traits.scores), ids=str)


def read_weights(decision, pull):
    """A scalar of everything in the decision that multiplies a token or an expert's output."""
    if isinstance(decision, Routing):
        return jnp.sum(pull(decision.weight_GTK) * decision.weight_GTK * decision.mask_GT[..., None])
    if isinstance(decision, ExpertChoice):
        return jnp.sum(pull(decision.weight_GEC) * decision.weight_GEC)
    tables = (decision.dispatch_GTEC, decision.combine_GTEC)
    return sum(jnp.sum(pull(table) * table) for table in tables)


def read_losses(decision, pull):
    read = decision.probs_GTE + 0.1 * jnp.square(decision.logits_GTE)
    return jnp.sum(pull(read) * read * decision.mask_GT[..., None])


def read_load(decision, pull):
    if getattr(decision, "smooth_load_GTE", None) is None:
        return jnp.float32(0)
    return jnp.sum(pull(decision.probs_GTE) * decision.smooth_load_GTE * decision.mask_GT[..., None])


READS = (read_weights, read_losses, read_load)


@every_router
def test_gradient_reaches_the_router_where_it_should_and_only_there(case):
    config, x = build(case), make_x(10, GROUPS, TOKENS, D_MODEL)
    params, traits = params_of(config), traits_of(config)

    def pull(values):  # any fixed numbers of mixed sign
        return jnp.cos(jnp.arange(values.size, dtype=jnp.float32)).reshape(values.shape)

    @jax.jit
    def gradients(params, x, bias):
        def read(*point):
            decision = apply(
                point[0], point[1], config, mask=MASK, key=group_keys(), bias=point[2], train=True
            )
            return jnp.stack([read(decision, pull) for read in READS])

        return jax.jacrev(read, argnums=(0, 1, 2))(params, x, bias)

    every_grad, every_x_grad, every_bias_grad = gradients(params, x, jnp.array([0.1, 0.0, -0.1]))
    assert not every_bias_grad.any()  # the bias is state, not a parameter
    for i, read in enumerate(READS):
        grad, x_grad = jax.tree.map(lambda leaf, i=i: leaf[i], (every_grad, every_x_grad))
        if traits.blind or (read is read_load and config.router != "noisy_top_k"):
            assert not any(leaf.any() for leaf in jax.tree.leaves((grad, x_grad)))
            continue
        assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(grad)), read
        assert not x_grad[~MASK].any()
        reached = jnp.abs(x_grad[MASK]).max(-1) > 0
        # Not every token is taken by an expert, and a load hardly moves where noise can't change the choice.
        some = config.router == "expert_choice" or read is read_load
        assert bool(reached.any() if some else reached.all()), read


@ruled_router
def test_gradient_of_the_first_weight_by_hand(case):
    # d p_i / d logit_j = p_i (delta_ij - p_j): for logits (ln 3, 0, 0), p = (3/5, 1/5, 1/5), of the first
    # weight (.24, -.12, -.12). Renormalised over the first two: w = 3/4, of which the third logit knows
    # nothing: (3/16, -3/16, 0).
    # By sigmoid, s = (3/4, 1/2, 1/2) and d s_i / d logit_i = s_i (1 - s_i): (3/16, 0, 0). Renormalised, w =
    # 3/4 / (5/4) = 3/5 and d w / d log s = w (1 - w) (1, -1) = (.24, -.24), times d log s_i / d logit_i =
    # 1 - s_i = (1/4, 1/2): (.06, -.12, 0).
    config = build(case)
    by_sigmoid, shared = traits_of(config).scores == "sigmoid", adds_to_one(config)
    expected = {
        (False, False): [0.24, -0.12, -0.12],
        (False, True): [3 / 16, -3 / 16, 0],
        (True, False): [3 / 16, 0, 0],
        (True, True): [0.06, -0.12, 0],
    }[by_sigmoid, shared]
    logits = jnp.array([[np.log(3.0), 0.0, 0.0]])
    grad = jax.jit(jax.grad(lambda logits: sm.route(logits, config).weight_GTK[0, 0]))(logits)
    assert_close_to_peak(grad[0], config.weight_scale * np.array(expected))


@every_router
def test_init_is_float32_and_follows_the_key(case):
    router = make_router(build(case))
    params, other = (jax.tree.leaves(router.init(jax.random.key(seed))) for seed in (3, 4))
    assert {leaf.dtype for leaf in params} <= {jnp.dtype("float32")}
    differs = [float(jnp.abs(a - b).max()) > 0 for a, b in zip(params, other, strict=True)]
    assert any(differs) or not params  # without parameters there is nothing to draw
    assert EXPERTS in jax.tree.leaves(jax.tree.map(jnp.shape, params)) or not params
