"""Soft gating: every token goes to every expert, as in the classical mixture of experts."""

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, refuse_unread
from switchmoe.routing.linear import linear_router
from switchmoe.routing.top_k import choose_top_k, weigh_by_softmax
from switchmoe.shapes import Array, Bool, Float


def choose_soft(logits_TE: Float[Array, "*G T E"], *, mask: Bool[Array, "*G T"] | None = None) -> Routing:
    """Send each token to all E experts, weighted by a softmax over its scores, the best first.

    Ties go to the lowest index. Everything returned is float32. The work is that of E dense layers.

    Source: Jacobs, Jordan, Nowlan & Hinton, Adaptive Mixtures of Local Experts, 1991, section 1,
    https://doi.org/10.1162/neco.1991.3.1.79.
    """
    return choose_top_k(logits_TE, k=logits_TE.shape[-1], mask=mask)


def soft(config: MoEConfig) -> Router:
    """Send each token to all experts (see `choose_soft`).

    Every expert is offered every token, so nothing is dropped unless a capacity factor is below 1 or
    `expert_capacity` is less than a group's tokens.
    """
    refuse_unread(config, "jitter", "input_dropout")
    if config.top_k != config.num_experts:
        raise ValueError(
            f"router='soft' sends a token to all num_experts={config.num_experts} experts, but "
            f"top_k={config.top_k}; set top_k={config.num_experts}, or use router='top_k'."
        )

    def decide(logits_TE, *, key, mask, bias):
        return choose_soft(logits_TE, mask=mask)

    return linear_router(config, decide, weigh_by_softmax)
