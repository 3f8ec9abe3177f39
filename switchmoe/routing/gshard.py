"""GShard's router: the best expert, and the second best only as often as it is worth."""

import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, draw_noise, refuse_unread
from switchmoe.routing.linear import linear_router
from switchmoe.routing.top_k import choose_top_k
from switchmoe.shapes import Array, Bool, Float, Key, ScalarKey


def choose_gshard(
    logits_TE: Float[Array, "*G T E"],
    *,
    key: ScalarKey | Key[Array, " G"] | None = None,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Routing:
    """Send each token to its best expert, and to its second best with twice that one's weight as probability.

    The two weights are divided by their sum; a second one of 1/2 (or, with a bias, more) is always used.
    Where it is skipped it becomes expert E with weight 0: it takes no seat and counts in no load; the first
    expert's weight stays what it was. Without a `key`, as in evaluation, the second is always used. `bias`
    is added to the probabilities for the choice only.

    Two readings differ from the paper's pseudo-code. There a skipped second choice still moves its expert's
    counter, so that a seat stays empty; here it does not. And its balance loss counts first choices alone;
    here every choice that is used counts.

    Source: GShard, section 2.2 and algorithm 1, https://arxiv.org/abs/2006.16668.
    """
    routing = choose_top_k(logits_TE, k=2, renormalize=True, mask=mask, bias=bias)
    if key is None:
        return routing
    num_experts = routing.probs_GTE.shape[-1]
    second_T = routing.weight_GTK[..., 1:]
    used_T = 2.0 * second_T > draw_noise(key, "second_expert", second_T.shape)  # algorithm 1: 2 g_2 > rnd
    used_TK = jnp.concatenate([jnp.ones_like(used_T), used_T], axis=-1)
    return routing._replace(
        expert_GTK=jnp.where(used_TK, routing.expert_GTK, num_experts),
        weight_GTK=jnp.where(used_TK, routing.weight_GTK, 0.0),
    )


def gshard(config: MoEConfig) -> Router:
    """Send each token to its best expert and, in training by chance, to its second (see `choose_gshard`)."""
    refuse_unread(config, "jitter", "input_dropout")
    if config.top_k != 2:
        raise ValueError(
            f"router='gshard' sends a token to two experts, but top_k={config.top_k}; "
            "set top_k=2, or use router='top_k'."
        )
    return linear_router(config, choose_gshard, needs_key_to="draws whether the second expert is used")
