"""Routers that judge each expert by itself, with a sigmoid, and are balanced by a bias instead of a loss."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, refuse_unread
from switchmoe.routing.linear import all_real, linear_router, pick_experts, read_chosen
from switchmoe.shapes import Array, Bool, Float, Int


def choose_sigmoid(
    logits_TE: Float[Array, "*G T E"],
    *,
    k: int = 1,
    renormalize: bool = False,
    weight_scale: float = 1.0,
    expert_groups: int = 1,
    groups_per_token: int = 1,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Routing:
    """Send each token to the k experts with the highest sigmoid score, weighted by that score.

    `bias` is added to the scores for the choice only (of groups too) and gets no gradient; the weights come
    from the scores without it. `renormalize` divides a token's k weights by their sum, and then
    `weight_scale` multiplies them. DeepSeek-V3 is `renormalize=True, weight_scale=2.5`.

    With `groups_per_token` below `expert_groups` a token chooses within its best groups (see
    `limit_to_groups`).

    `probs_GTE`, which losses and metrics read, are the scores divided by their sum over all experts, as in
    DeepSeek-V3's own balance loss (equations 17-20). The z-loss still reads the logits.

    Source: DeepSeek-V3, equations 12-16, https://arxiv.org/abs/2412.19437.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    log_score_TE = jax.nn.log_sigmoid(logits_TE)
    score_TE = jnp.exp(log_score_TE)  # equation 15
    biased_TE = score_TE if bias is None else score_TE + bias
    expert_TK = pick_experts(limit_to_groups(biased_TE, expert_groups, groups_per_token), k)  # equation 16
    weight_TK = weigh_by_sigmoid(logits_TE, expert_TK, renormalize=renormalize, weight_scale=weight_scale)
    # exp of a log score is a score, so a softmax of log scores divides scores by their sum, even where all
    # of them are too small for float32.
    probs_TE = jax.nn.softmax(log_score_TE, axis=-1)
    return Routing(expert_TK, weight_TK, logits_TE, probs_TE, all_real(logits_TE, mask))


def weigh_by_sigmoid(
    logits_TE: Float[Array, "*G T E"],
    expert_TK: Int[Array, "*G T K"],
    *,
    renormalize: bool = False,
    weight_scale: float = 1.0,
) -> Float[Array, "*G T K"]:
    """Weigh a token's experts by their sigmoid scores, or by these over their sum; expert E gets 0."""
    log_score_TE = jax.nn.log_sigmoid(logits_TE.astype(jnp.float32))
    if renormalize:
        used_TK = expert_TK < logits_TE.shape[-1]
        weight_TK = jax.nn.softmax(
            read_chosen(log_score_TE, expert_TK), axis=-1, where=used_TK
        )  # equation 13
    else:
        weight_TK = read_chosen(jnp.exp(log_score_TE), expert_TK)
    return weight_TK * weight_scale


def limit_to_groups(
    scores_TE: Float[Array, "*G T E"], expert_groups: int, groups_per_token: int
) -> Float[Array, "*G T E"]:
    """Leave a token only the experts of its best groups: the scores of all others become minus infinity.

    Experts stand in `expert_groups` equal groups of neighbours. A group's score is the sum of its two best
    experts' scores (of its only one, in groups of one): the paper's K / M best for its K = 8 experts in M = 4
    groups. Ties go to the lowest index. Minus infinity and not 0, since a biased score may be negative.

    Source: DeepSeek-V3, section 2.1.2 (node-limited routing), https://arxiv.org/abs/2412.19437.
    """
    if groups_per_token == expert_groups:
        return scores_TE
    *leading, num_experts = scores_TE.shape
    group_size = num_experts // expert_groups
    members = scores_TE.reshape(*leading, expert_groups, group_size)
    group_scores = lax.top_k(members, min(2, group_size))[0].sum(axis=-1)
    best = pick_experts(group_scores, groups_per_token)
    is_best = jax.nn.one_hot(best, expert_groups, dtype=bool).any(axis=-2)
    return jnp.where(is_best[..., None], members, -jnp.inf).reshape(scores_TE.shape)


def update_bias(
    bias_E: Float[Array, "*L E"], load_E: Float[Array, "*L E"], step: float = 1e-3
) -> Float[Array, "*L E"]:
    """Make experts that got too few tokens easier to choose and the others harder, by one small step each.

    bias + step * sign(mean load - load). Once an optimizer step, outside the gradient, with the load
    (`MoEAux.load_E`) summed over micro-batches and devices, and not when the step is skipped. The bias is
    state, not a parameter: hand it to `moe(..., bias=)`. Layers may be stacked in front. A load of zeros, no
    token at all, changes nothing.

    Source: Wang et al., auxiliary-loss-free load balancing, algorithm 1, https://arxiv.org/abs/2408.15664.
    """
    return bias_E + step * jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)


def sigmoid(config: MoEConfig) -> Router:
    """Send each token to its `config.top_k` highest sigmoid scores (see `choose_sigmoid`)."""
    refuse_unread(
        config,
        "renormalize",
        "jitter",
        "input_dropout",
        "weight_scale",
        "expert_groups",
        "groups_per_token",
        "overflow",
        "bias_step",
    )
    if config.overflow == "next" and config.groups_per_token < config.expert_groups:
        raise ValueError(
            "overflow='next' sends a token to any expert with a free seat, but groups_per_token="
            f"{config.groups_per_token} limits it to some; leave overflow at 'drop', or lift the limit."
        )
    choose = functools.partial(
        choose_sigmoid,
        k=config.top_k,
        renormalize=config.renormalize,
        weight_scale=config.weight_scale,
        expert_groups=config.expert_groups,
        groups_per_token=config.groups_per_token,
    )

    def decide(logits_TE, *, key, mask, bias):
        return choose(logits_TE, mask=mask, bias=bias)

    weigh = functools.partial(
        weigh_by_sigmoid, renormalize=config.renormalize, weight_scale=config.weight_scale
    )
    return linear_router(config, decide, weigh)
