"""Noisy top-k: scores with a noise whose size is learnt, the k best kept, and a load that has a gradient."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, draw_noise, refuse_unread, require_key
from switchmoe.routing.linear import all_real, init_linear_router, pick_experts, read_chosen, score_tokens
from switchmoe.routing.top_k import weigh_by_softmax_of_chosen
from switchmoe.shapes import Array, Bool, Float, Key, ScalarKey

LEAST_DEVIATION = 1e-6  # so that a division by it keeps a finite slope


class NoisyRouterParams(NamedTuple):
    """The two weights of noisy top-k, both float32.

    Attributes:
      router_DE: x to scores, the paper's W_g.
      noise_DE: x to what softplus makes the noise's deviation of, the paper's W_noise. It starts at zero, as
        in the paper's appendix A: a deviation of ln 2 for every token and expert.
    """

    router_DE: Float[Array, "D E"]
    noise_DE: Float[Array, "D E"]


def choose_noisy_top_k(
    logits_TE: Float[Array, "*G T E"],
    deviation_TE: Float[Array, "*G T E"] | None = None,
    *,
    k: int = 2,
    key: ScalarKey | Key[Array, " G"] | None = None,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Routing:
    """Send each token to its k highest scores after noise, weighted by a softmax over those k scores alone.

    With a `key` each score gets normal noise of deviation `deviation_TE`. `logits_GTE` are the noisy scores H
    and `probs_GTE` the sparse G: the k weights at their experts, 0 elsewhere. With a deviation there is also
    `smooth_load_GTE` (see `smooth_load`), with or without a key. `bias` is added to the softmax of H over all
    experts for the choice only, and the smooth load does not know it. Ties go to the lowest index. Everything
    returned is float32.

    Raises:
      ValueError: if there is a key and no deviation.

    Source: Outrageously Large Neural Networks, equations 3-5, https://arxiv.org/abs/1701.06538.
    """
    clean_TE = noisy_TE = logits_TE.astype(jnp.float32)
    load_TE = None
    if key is not None:
        if deviation_TE is None:
            raise ValueError("A key without deviation_TE draws noise of no known size; pass both or neither.")
        noise_TE = draw_noise(key, "noisy_top_k", clean_TE.shape, jax.random.normal)
        noisy_TE = clean_TE + noise_TE * deviation_TE  # equation 4
    if deviation_TE is not None:
        load_TE = smooth_load(clean_TE, noisy_TE, deviation_TE, k)
    expert_TK = pick_experts(noisy_TE if bias is None else jax.nn.softmax(noisy_TE, axis=-1) + bias, k)
    weight_TK = weigh_by_softmax_of_chosen(noisy_TE, expert_TK)  # equations 3 and 5
    one_hot_TKE = jax.nn.one_hot(expert_TK, clean_TE.shape[-1], dtype=jnp.float32)
    gate_TE = jnp.sum(weight_TK[..., None] * one_hot_TKE, axis=-2)
    return Routing(expert_TK, weight_TK, noisy_TE, gate_TE, all_real(clean_TE, mask), load_TE)


def smooth_load(
    clean_TE: Float[Array, "*G T E"],
    noisy_TE: Float[Array, "*G T E"],
    deviation_TE: Float[Array, "*G T E"],
    k: int,
) -> Float[Array, "*G T E"]:
    """Say how probably a token would go to each expert if that one score's noise were drawn anew.

    The noise on the other scores stays as it is in `noisy_TE`, so the score has to beat the k-th highest of
    them. Summed over tokens it stands in for the load and, unlike a count, has a gradient. With k experts in
    all there is nothing to beat, and it is 1.

    Source: Outrageously Large Neural Networks, appendix A, equations 8-9, https://arxiv.org/abs/1701.06538.
    """
    num_experts = clean_TE.shape[-1]
    if k == num_experts:
        return jnp.ones_like(clean_TE)
    best_TK = pick_experts(noisy_TE, k + 1)
    kth_T, next_T = jnp.moveaxis(read_chosen(noisy_TE, best_TK[..., k - 1 :]), -1, 0)
    chosen_TE = jax.nn.one_hot(best_TK[..., :k], num_experts, dtype=bool).any(axis=-2)
    # kth_excluding(H, k, i): without one of the k best, the k-th is the one that came after them.
    beat_TE = jnp.where(chosen_TE, next_T[..., None], kth_T[..., None])
    ahead_TE = (clean_TE - beat_TE) / jnp.maximum(deviation_TE, LEAST_DEVIATION)
    return normal_cdf(ahead_TE)


@jax.custom_jvp
def normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Give the probability that a standard normal variable is below x.

    jax 0.12 can use neither that of jax.scipy nor the derivative of erfc inside shard_map.
    """
    return 0.5 * lax.erfc(-(0.5**0.5) * x)


@normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
    return normal_cdf(*primals), jnp.exp(-0.5 * jnp.square(primals[0])) * (0.5 / math.pi) ** 0.5 * tangents[0]


def noisy_top_k(config: MoEConfig) -> Router:
    """Send each token to its `config.top_k` best scores, in training after noise (see `choose_noisy_top_k`).

    Deciding from scores alone (`choose`) knows no deviation, so it gives no smooth load.
    """
    refuse_unread(config, "jitter", "input_dropout", "overflow", "load_coef", "bias_step")
    if config.top_k == 1:
        raise ValueError(
            "router='noisy_top_k' with top_k=1 makes every weight 1, so the router gets no gradient; "
            "set top_k to 2 or more, or use router='switch'."
        )

    def init(key):
        router_DE = init_linear_router(
            key, d_model=config.d_model, num_experts=config.num_experts, init_scale=config.init_scale
        )
        return NoisyRouterParams(router_DE, jnp.zeros_like(router_DE))

    def choose(logits_TE, *, mask=None, bias=None):
        return choose_noisy_top_k(logits_TE, k=config.top_k, mask=mask, bias=bias)

    def apply(params, x_GTD, *, key=None, mask=None, token_ids=None, bias=None, train=False):
        key = require_key(config, key, "adds noise to its scores") if train else None
        # Both products in one, so that jitter and dropout are the same for both.
        both_DE = jnp.concatenate([params.router_DE, params.noise_DE], axis=-1)
        both_GTE = score_tokens(both_DE, x_GTD, jitter=config.jitter, dropout=config.input_dropout, key=key)
        clean_GTE, spread_GTE = jnp.split(both_GTE, 2, axis=-1)
        return choose_noisy_top_k(
            clean_GTE, jax.nn.softplus(spread_GTE), k=config.top_k, key=key, mask=mask, bias=bias
        )

    return Router(init, apply, choose, weigh_by_softmax_of_chosen)
