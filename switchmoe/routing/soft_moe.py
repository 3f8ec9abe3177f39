"""Soft MoE: no token is sent anywhere; seats hold mixtures of tokens, and tokens get mixtures of seats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, SoftMix, refuse_unread
from switchmoe.routing.linear import init_linear_router
from switchmoe.shapes import Array, Bool, Float


class SoftRouterParams(NamedTuple):
    """A vector for each seat, and one scale, both float32.

    Attributes:
      slot_DEC: each seat's vector, the paper's Phi; only its direction says something.
      scale_1: multiplies every score; starts at 1.
    """

    slot_DEC: Float[Array, "D E C"]
    scale_1: Float[Array, " 1"]


def score_slots(params: SoftRouterParams, x_GTD: Float[Array, "*G T D"]) -> Float[Array, "*G T E C"]:
    """Score every seat of every expert for each token: the scale times the cosine of their two vectors.

    In float32 whatever the activations' dtype. A token of zeros scores 0 everywhere.

    Source: From Sparse to Soft Mixtures of Experts, section 2.3, https://arxiv.org/abs/2308.00951.
    """
    x_GTD = _normalize(x_GTD.astype(jnp.float32), axis=-1)
    slot_DEC = params.scale_1 * _normalize(params.slot_DEC.astype(jnp.float32), axis=0)
    return jnp.einsum("...TD,DEC->...TEC", x_GTD, slot_DEC, precision=lax.Precision.HIGHEST)


def _normalize(vectors: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Divide by the L2 norm; a vector of zeros stays as it is, and its slope is finite."""
    squares = jnp.sum(jnp.square(vectors), axis=axis, keepdims=True)
    return vectors * lax.rsqrt(jnp.maximum(squares, 1e-12))


def choose_soft_mix(logits_TEC: Float[Array, "*G T E C"], mask: Bool[Array, "*G T"] | None = None) -> SoftMix:
    """Mix all tokens of a group into every seat, and all seats into every token's result.

    A seat's shares of the tokens are a softmax over the tokens, a token's shares of the seats one over all
    experts' seats. A masked token has share 0 in every seat and gets 0 of every seat; without a real token
    everything is 0. Logits are read as float32, and everything returned is float32.

    Source: From Sparse to Soft Mixtures of Experts, section 2.1, https://arxiv.org/abs/2308.00951.
    """
    logits_TEC = logits_TEC.astype(jnp.float32)
    mask_T = jnp.ones(logits_TEC.shape[:-2], bool) if mask is None else mask
    real_TEC = mask_T[..., None, None]
    dispatch_TEC = jax.nn.softmax(logits_TEC, axis=-3, where=real_TEC)
    combine_TEC = jnp.where(real_TEC, jax.nn.softmax(logits_TEC, axis=(-2, -1)), 0.0)
    return SoftMix(
        dispatch_GTEC=dispatch_TEC,
        combine_GTEC=combine_TEC,
        logits_GTE=jax.nn.logsumexp(logits_TEC, axis=-1),
        probs_GTE=combine_TEC.sum(axis=-1),
        mask_GT=mask_T,
    )


def soft_moe(config: MoEConfig) -> Router:
    """Give each of `config.slots_per_expert` seats of an expert a mixture of tokens (see `choose_soft_mix`).

    Its scores are [T, E, C], so there is nothing to decide from scores [T, E] alone. Capacity factors and the
    way of dispatch say nothing.
    """
    refuse_unread(config, "slots_per_expert")
    if config.top_k != 1:
        raise ValueError(
            f"router='soft_moe' gives each token some of every seat, but top_k={config.top_k}; leave it at 1."
        )
    if config.dispatch == "dropless":
        raise ValueError(
            "router='soft_moe' mixes tokens into seats, which dispatch='dropless' does not have; "
            "choose dispatch='gather'."
        )
    if config.expert_capacity is not None:
        raise ValueError(
            f"router='soft_moe' has slots_per_expert={config.slots_per_expert} seats an expert, but "
            f"expert_capacity={config.expert_capacity}; leave that at None and set the other."
        )

    def init(key):
        slots = config.num_experts * config.slots_per_expert
        slot_DN = init_linear_router(
            key, d_model=config.d_model, num_experts=slots, init_scale=config.init_scale
        )
        slot_DEC = rearrange(slot_DN, "D (E C) -> D E C", E=config.num_experts)
        return SoftRouterParams(slot_DEC, jnp.ones(1, jnp.float32))

    def choose(logits_TE, *, mask=None, bias=None):
        raise ValueError(
            "router='soft_moe' scores seats, not experts, so it can't decide from logits [T, E]; "
            "use choose_soft_mix with logits [T, E, C]."
        )

    def apply(params, x_GTD, *, key=None, mask=None, token_ids=None, bias=None, train=False):
        return choose_soft_mix(score_slots(params, x_GTD), mask)

    return Router(init, apply, choose, leak="every seat mixes later tokens into what earlier ones get")
