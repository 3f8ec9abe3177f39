"""Hash routing: a token's id alone says where it goes, and nothing is learnt."""

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, refuse_unread
from switchmoe.routing.blind import weigh_evenly
from switchmoe.routing.linear import pick_experts
from switchmoe.shapes import Array, Bool, Int

LEAST_LOGIT = -80.0  # exp of it is nothing beside 1 / k in float32


def choose_by_hash(
    token_ids_T: Int[Array, "*G T"], *, num_experts: int, k: int = 1, mask: Bool[Array, "*G T"] | None = None
) -> Routing:
    """Send each token to the k experts that its id hashes to, each with weight 1/k.

    Every pair (id, expert) hashes to a number, and the k experts with the smallest numbers are chosen: k
    different ones, each with the same chance over ids. The hash is fixed: the same in every layer, run and
    machine. `probs_GTE` are 1/k at the chosen experts and `logits_GTE` their logarithms, at least -80, so
    that their logsumexp is 0. Nothing has a gradient.

    Source: Hash Layers, section 3 (random hash), https://arxiv.org/abs/2106.04426; there a table drawn once
    takes the place of the hash, and a token goes to one expert.
    """
    hashed_TE = _mix(
        _mix(token_ids_T.astype(jnp.uint32))[..., None] ^ jnp.arange(num_experts, dtype=jnp.uint32)
    )
    # The upper 24 bits, which a float32 holds exactly.
    expert_TK = pick_experts(-(hashed_TE >> 8).astype(jnp.float32), k)
    probs_TE = jax.nn.one_hot(expert_TK, num_experts, dtype=jnp.float32).sum(axis=-2) / k
    logits_TE = jnp.where(probs_TE > 0, -jnp.log(jnp.float32(k)), LEAST_LOGIT)
    mask_T = jnp.ones(token_ids_T.shape, bool) if mask is None else mask
    return Routing(expert_TK, weigh_evenly(logits_TE, expert_TK), logits_TE, probs_TE, mask_T)


def _mix(value: Array) -> Array:
    """Scatter uint32 values over their whole range, one to one: MurmurHash3's finalizer.

    Source: https://github.com/aappleby/smhasher/wiki/MurmurHash3 (public domain). A constant is added first,
    since the finalizer alone sends 0 to 0.
    """
    value = value + jnp.uint32(0x9E3779B9)
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)


def hash_router(config: MoEConfig) -> Router:
    """Send each token to `config.top_k` experts by its id (see `choose_by_hash`); there are no parameters."""
    refuse_unread(config)

    def init(key):
        return ()

    def choose(logits_TE, *, mask=None, bias=None):
        raise ValueError(
            "router='hash' reads token ids and no scores, so it can't decide from logits; "
            "use choose_by_hash with token ids."
        )

    def apply(params, x_GTD, *, key=None, mask=None, token_ids=None, bias=None, train=False):
        if token_ids is None:
            raise ValueError("router='hash' decides by token ids; pass token_ids=.")
        return choose_by_hash(token_ids, num_experts=config.num_experts, k=config.top_k, mask=mask)

    return Router(init, apply, choose, weigh_evenly)
