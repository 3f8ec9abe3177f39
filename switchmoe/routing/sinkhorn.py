"""Sinkhorn routing (S-BASE): in training, choices that a balanced transport plan makes even over experts."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, refuse_unread
from switchmoe.routing.groupwise import groupwise_router
from switchmoe.routing.linear import all_real, pick_experts
from switchmoe.routing.top_k import choose_top_k, weigh_by_softmax
from switchmoe.shapes import Array, Bool, Float

SINKHORN_ROUNDS = 20
UNLIKELY = -1e30  # a logarithm of nothing at all that can still be subtracted


def sinkhorn_plan(
    logits_TE: Float[Array, "*G T E"],
    mask_T: Bool[Array, "*G T"],
    *,
    rounds: int = SINKHORN_ROUNDS,
) -> Float[Array, "*G T E"]:
    """Share each token out over the experts, near its scores, so that all experts get equally much.

    The logarithm of the plan P that is nearest to exp(scores) (in the entropy-regularised sense, temperature
    1) among those whose real tokens have shares that add to 1 and whose n real tokens give every expert
    n / E. Every round makes the experts' totals right and then the tokens', so at the end the tokens' are
    exact and the experts' nearly so. What stands at masked tokens takes no part. Float32, no gradient.

    Source: Unified Scaling Laws for Routed Language Models, section 3.1 and its appendix on S-BASE,
    https://arxiv.org/abs/2202.01169; Cuturi 2013, algorithm 1, https://arxiv.org/abs/1306.0895.
    """
    logits_TE = lax.stop_gradient(logits_TE.astype(jnp.float32))
    real_TE = mask_T[..., None]
    tokens = jnp.maximum(real_TE.sum(axis=-2, keepdims=True), 1)
    log_share = jnp.log(tokens / logits_TE.shape[-1])

    def log_sum(values, axis):
        return jnp.maximum(jax.nn.logsumexp(values, axis=axis, keepdims=True), UNLIKELY)

    def make_tokens_even(log_plan_TE):
        return log_plan_TE - log_sum(log_plan_TE, -1)

    def make_experts_even(log_plan_TE):
        return log_plan_TE + log_share - log_sum(jnp.where(real_TE, log_plan_TE, -jnp.inf), -2)

    def turn(_, log_plan_TE):
        return make_tokens_even(make_experts_even(log_plan_TE))

    return lax.fori_loop(0, rounds, turn, make_tokens_even(logits_TE))


def choose_sinkhorn(
    logits_TE: Float[Array, "*G T E"],
    *,
    k: int = 1,
    renormalize: bool = False,
    rounds: int = SINKHORN_ROUNDS,
    mask: Bool[Array, "*G T"] | None = None,
) -> Routing:
    """Send each token to the k experts that get most of it in a balanced plan, weighted by its own softmax.

    The plan (see `sinkhorn_plan`) is made of all real tokens of the group, so a token's experts depend on the
    others. A token goes whole to where most of its share goes, so loads are nearly even and not exactly. The
    weights are the softmax probabilities of the scores, with their gradient; the plan has none. Ties go to
    the lowest index. This is the choice in training; in evaluation it is `choose_top_k`'s.

    Source: Unified Scaling Laws for Routed Language Models, section 3.1, https://arxiv.org/abs/2202.01169,
    which takes k = 1.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    mask_T = all_real(logits_TE, mask)
    expert_TK = pick_experts(sinkhorn_plan(logits_TE, mask_T, rounds=rounds), k)
    weight_TK = weigh_by_softmax(logits_TE, expert_TK, renormalize=renormalize)
    return Routing(expert_TK, weight_TK, logits_TE, jax.nn.softmax(logits_TE, axis=-1), mask_T)


def sinkhorn(config: MoEConfig) -> Router:
    """Send each token to `config.top_k` experts, evenly in training (see `choose_sinkhorn`).

    In evaluation each token takes its own most probable experts, whatever the others do. A balance bias is
    not read: in training the plan would undo it.
    """
    refuse_unread(config, "renormalize", "jitter", "input_dropout", "overflow")

    def decide(logits_TE, *, train, mask):
        choose = choose_sinkhorn if train else choose_top_k
        return choose(logits_TE, k=config.top_k, renormalize=config.renormalize, mask=mask)

    weigh = functools.partial(weigh_by_softmax, renormalize=config.renormalize)
    leak = "in training a later token can move an earlier one to another expert"
    return groupwise_router(config, decide, weigh, leak=leak)
