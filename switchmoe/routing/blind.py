"""Routers that look at no score, for benchmarks alone: nothing is learnt, and no gradient reaches the router.

They score every token all the same, so that a layer costs what it costs with a router that looks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, draw_noise, refuse_unread, require_key
from switchmoe.routing.linear import all_real, linear_router, pick_experts, score_tokens
from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey


def choose_random(
    logits_TE: Float[Array, "*G T E"],
    *,
    key: ScalarKey | Key[Array, " G"],
    k: int = 1,
    mask: Bool[Array, "*G T"] | None = None,
) -> Routing:
    """Send each token to k different experts drawn evenly at random, each with weight 1/k. For benchmarks.

    Its drops are those that `expected_dropped` foretells. The scores are handed on for the metrics only.
    """
    return _ignore_scores(logits_TE, pick_experts(draw_noise(key, "random", logits_TE.shape), k), mask)


def choose_balanced(
    logits_TE: Float[Array, "*G T E"], *, k: int = 1, mask: Bool[Array, "*G T"] | None = None
) -> Routing:
    """Deal the experts out like cards: a group's token t gets k from number t * k on, each with weight 1/k.

    Choice j of token t is expert (t * k + j) mod E, where t counts the tokens that are not padding, so no
    two loads of a group differ by more than 1 and nothing is dropped at a capacity factor of 1. For
    benchmarks.
    """
    turn_T = jnp.maximum(jnp.cumsum(all_real(logits_TE, mask), axis=-1) - 1, 0)
    expert_TK = (turn_T[..., None] * k + jnp.arange(k)) % logits_TE.shape[-1]
    return _ignore_scores(logits_TE, expert_TK.astype(jnp.int32), mask)


def _ignore_scores(
    logits_TE: Float[Array, "*G T E"], expert_TK: Int[Array, "*G T K"], mask: Bool[Array, "*G T"] | None
) -> Routing:
    logits_TE = lax.stop_gradient(logits_TE.astype(jnp.float32))
    weight_TK = weigh_evenly(logits_TE, expert_TK)
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    return Routing(expert_TK, weight_TK, logits_TE, probs_TE, all_real(logits_TE, mask))


def weigh_evenly(
    logits_TE: Float[Array, "*G T E"], expert_TK: Int[Array, "*G T K"]
) -> Float[Array, "*G T K"]:
    """Weigh each of a token's k experts 1/k, whatever its scores; expert E, not used, gets 0."""
    return (expert_TK < logits_TE.shape[-1]).astype(jnp.float32) / expert_TK.shape[-1]


def random(config: MoEConfig) -> Router:
    """Send each token to `config.top_k` experts drawn blindly (see `choose_random`). For benchmarks.

    Training needs a key. Evaluation reads one too; without one it draws the same experts every time.
    """
    refuse_unread(config)
    scoring = linear_router(config, choose_random, weigh_evenly)

    def choose(logits_TE, *, key=None, mask=None, bias=None):
        key = jax.random.key(0) if key is None else key
        return choose_random(logits_TE, key=key, k=config.top_k, mask=mask)

    def apply(params, x_GTD, *, key=None, mask=None, token_ids=None, bias=None, train=False):
        if train:
            require_key(config, key, "draws experts")
        return choose(score_tokens(params, x_GTD), key=key, mask=mask)

    return Router(scoring.init, apply, choose, weigh_evenly)


def balanced(config: MoEConfig) -> Router:
    """Send each token to the experts whose turn it is (see `choose_balanced`). For benchmarks."""
    refuse_unread(config)

    def decide(logits_TE, *, key, mask, bias):
        return choose_balanced(logits_TE, k=config.top_k, mask=mask)

    return linear_router(config, decide, weigh_evenly)
