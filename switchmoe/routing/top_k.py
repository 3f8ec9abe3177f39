"""Routers that send each token to the k experts it scores highest, by softmax."""

import functools

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, draw_noise, refuse_unread
from switchmoe.routing.linear import all_real, linear_router, pick_experts, read_chosen, renormalize_weights
from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey


def choose_top_k(
    logits_TE: Float[Array, "*G T E"],
    *,
    k: int = 1,
    renormalize: bool = False,
    key: ScalarKey | Key[Array, " G"] | None = None,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Routing:
    """Send each token to the k experts it gives the highest probability, weighted by that probability.

    Softmax comes before the choice; ties go to the lowest index. With `renormalize` a token's k weights are
    divided by their sum (Mixtral). `bias` is added to the probabilities for the choice only and gets no
    gradient. With a `key` the k different experts are drawn instead, one after the other, each by its
    probability (plus bias) among those left; the weights are the same probabilities. Logits are read as
    float32, and everything returned is float32.

    Source: Switch Transformers, equations 1-2 and section C (sampling), https://arxiv.org/abs/2101.03961;
    Mixtral, section 2.1, https://arxiv.org/abs/2401.04088; drawing k by Gumbel noise: Kool et al., section
    2, https://arxiv.org/abs/1903.06059.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)  # equation 1
    scores_TE = probs_TE if bias is None else probs_TE + bias
    if key is not None:
        gumbel_TE = draw_noise(key, "sample", scores_TE.shape, jax.random.gumbel)
        scores_TE = jnp.log(jnp.maximum(scores_TE, jnp.finfo(jnp.float32).tiny)) + gumbel_TE
    elif bias is None:
        scores_TE = logits_TE  # the same order, and still one where probabilities are too small for float32
    expert_TK = pick_experts(scores_TE, k)
    weight_TK = weigh_by_softmax(logits_TE, expert_TK, renormalize=renormalize)
    return Routing(expert_TK, weight_TK, logits_TE, probs_TE, all_real(logits_TE, mask))


def weigh_by_softmax(
    logits_TE: Float[Array, "*G T E"], expert_TK: Int[Array, "*G T K"], *, renormalize: bool = False
) -> Float[Array, "*G T K"]:
    """Weigh a token's experts by their probability, or by their share of the chosen ones' probability.

    Source: Switch Transformers, equation 2, https://arxiv.org/abs/2101.03961.
    """
    weight_TK = read_chosen(jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1), expert_TK)
    return renormalize_weights(weight_TK) if renormalize else weight_TK


def weigh_by_softmax_of_chosen(
    logits_TE: Float[Array, "*G T E"], expert_TK: Int[Array, "*G T K"]
) -> Float[Array, "*G T K"]:
    """Weigh a token's experts by a softmax over their scores alone; expert E, not used, gets 0."""
    used_TK = expert_TK < logits_TE.shape[-1]
    chosen_TK = read_chosen(logits_TE.astype(jnp.float32), expert_TK)
    return jax.nn.softmax(chosen_TK, axis=-1, where=used_TK)


def choose_top_k_then_softmax(
    logits_TE: Float[Array, "*G T E"],
    *,
    k: int = 2,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Routing:
    """Send each token to its k highest scores, weighted by a softmax over those k scores alone.

    The k weights add to 1. Apart from rounding this is `choose_top_k(renormalize=True)`, since a softmax over
    some of the scores is the whole softmax divided by their share; here no probability is ever divided.
    `bias` is added to the probabilities over all experts for the choice only.

    Source: GPT-OSS model card, section 2.2, https://arxiv.org/abs/2508.10925.
    """
    routing = choose_top_k(logits_TE, k=k, mask=mask, bias=bias)
    return routing._replace(weight_GTK=weigh_by_softmax_of_chosen(routing.logits_GTE, routing.expert_GTK))


def top_k(config: MoEConfig) -> Router:
    """Send each token to its `config.top_k` most probable experts (see `choose_top_k`).

    In training, `config.exploration="sample"` draws them by their probability instead.
    """
    refuse_unread(config, "renormalize", "jitter", "input_dropout", "exploration", "overflow", "bias_step")
    choose = functools.partial(choose_top_k, k=config.top_k, renormalize=config.renormalize)
    weigh = functools.partial(weigh_by_softmax, renormalize=config.renormalize)
    if config.exploration == "sample":
        return linear_router(config, choose, weigh, needs_key_to="draws experts by their probability")

    def decide(logits_TE, *, key, mask, bias):
        return choose(logits_TE, mask=mask, bias=bias)

    return linear_router(config, decide, weigh)


def switch(config: MoEConfig) -> Router:
    """Send each token to its single most probable expert, weighted by that probability.

    Source: Switch Transformers, section 2.1, https://arxiv.org/abs/2101.03961.
    """
    if config.top_k != 1:
        raise ValueError(
            f"router='switch' sends a token to one expert, but top_k={config.top_k}; use router='top_k'."
        )
    return top_k(config)


def top_k_then_softmax(config: MoEConfig) -> Router:
    """Send each token to its `config.top_k` highest scores (see `choose_top_k_then_softmax`)."""
    refuse_unread(config, "jitter", "input_dropout", "overflow", "bias_step")
    if config.top_k == 1:
        raise ValueError(
            "router='top_k_then_softmax' with top_k=1 makes every weight 1, so the router gets no gradient; "
            "set top_k to 2 or more, or use router='switch'."
        )

    def decide(logits_TE, *, key, mask, bias):
        return choose_top_k_then_softmax(logits_TE, k=config.top_k, mask=mask, bias=bias)

    return linear_router(config, decide, weigh_by_softmax_of_chosen)
