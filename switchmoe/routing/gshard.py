"""GShard's router: the best expert, and the second best only as often as it is worth."""

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, draw_noise, refuse_unread
from switchmoe.routing.linear import linear_router, read_chosen
from switchmoe.routing.top_k import choose_top_k
from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey


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


def weigh_gshard(
    logits_TE: Float[Array, "*G T E"], expert_TK: Int[Array, "*G T K"]
) -> Float[Array, "*G T K"]:
    """Weigh two given experts by their share of the two probabilities, also where the second is not used.

    A second choice that is not used (expert E) weighs 0, and the first is weighed beside the most probable
    other expert, which that choice was unless a balance bias made it: the choice itself is not known here.
    """
    probs_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    prob_TK = read_chosen(probs_TE, expert_TK)
    first_TE = jax.nn.one_hot(expert_TK[..., 0], probs_TE.shape[-1], dtype=bool)
    other_T = jnp.where(first_TE, 0.0, probs_TE).max(axis=-1)
    second_T = jnp.where(expert_TK[..., 1] < probs_TE.shape[-1], prob_TK[..., 1], other_T)
    return prob_TK / jnp.maximum(prob_TK[..., 0] + second_T, jnp.finfo(jnp.float32).tiny)[..., None]


def gshard(config: MoEConfig) -> Router:
    """Send each token to its best expert and, in training by chance, to its second (see `choose_gshard`)."""
    refuse_unread(config, "jitter", "input_dropout", "overflow", "bias_step")
    if config.top_k != 2:
        raise ValueError(
            f"router='gshard' sends a token to two experts, but top_k={config.top_k}; "
            "set top_k=2, or use router='top_k'."
        )
    return linear_router(
        config, choose_gshard, weigh_gshard, needs_key_to="draws whether the second expert is used"
    )
