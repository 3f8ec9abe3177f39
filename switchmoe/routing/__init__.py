"""Tokens to a decision: which experts each token goes to, and with which weight."""

from switchmoe.config import MoEConfig, check_choice
from switchmoe.routing.aux_sums import MoEAux, add_aux
from switchmoe.routing.base import Decision, ExpertChoice, Router, RouterParams, Routing, SoftMix, group_keys
from switchmoe.routing.base_layers import assign_evenly, base_layer, choose_base
from switchmoe.routing.blind import balanced, random
from switchmoe.routing.expert_choice import choose_by_experts, expert_choice
from switchmoe.routing.gshard import choose_gshard, gshard
from switchmoe.routing.hash import choose_by_hash, hash_router
from switchmoe.routing.losses import balance_loss, importance_loss, load_loss, sequence_balance_loss, z_loss
from switchmoe.routing.metrics import aux_loss, summarize
from switchmoe.routing.noisy import NoisyRouterParams, choose_noisy_top_k, noisy_top_k
from switchmoe.routing.sigmoid import choose_sigmoid, sigmoid, update_bias
from switchmoe.routing.sinkhorn import choose_sinkhorn, sinkhorn
from switchmoe.routing.soft import choose_soft, soft
from switchmoe.routing.soft_moe import SoftRouterParams, choose_soft_mix, score_slots, soft_moe
from switchmoe.routing.top_k import choose_top_k, choose_top_k_then_softmax, switch, top_k, top_k_then_softmax
from switchmoe.shapes import Array, Bool, Float

__all__ = [
    "ROUTERS",
    "Decision",
    "ExpertChoice",
    "MoEAux",
    "NoisyRouterParams",
    "Router",
    "RouterParams",
    "Routing",
    "SoftMix",
    "SoftRouterParams",
    "add_aux",
    "assign_evenly",
    "aux_loss",
    "balance_loss",
    "balanced",
    "base_layer",
    "choose_base",
    "choose_by_experts",
    "choose_by_hash",
    "choose_gshard",
    "choose_noisy_top_k",
    "choose_sigmoid",
    "choose_sinkhorn",
    "choose_soft",
    "choose_soft_mix",
    "choose_top_k",
    "choose_top_k_then_softmax",
    "expert_choice",
    "group_keys",
    "gshard",
    "hash_router",
    "importance_loss",
    "load_loss",
    "make_router",
    "noisy_top_k",
    "random",
    "route",
    "score_slots",
    "sequence_balance_loss",
    "sigmoid",
    "sinkhorn",
    "soft",
    "soft_moe",
    "summarize",
    "switch",
    "top_k",
    "top_k_then_softmax",
    "update_bias",
    "z_loss",
]

ROUTERS = {
    "switch": switch,
    "top_k": top_k,
    "top_k_then_softmax": top_k_then_softmax,
    "gshard": gshard,
    "sigmoid": sigmoid,
    "noisy_top_k": noisy_top_k,
    "expert_choice": expert_choice,
    "soft_moe": soft_moe,
    "soft": soft,
    "sinkhorn": sinkhorn,
    "base": base_layer,
    "hash": hash_router,
    "random": random,  # this one and the next are for benchmarks
    "balanced": balanced,
}


def make_router(config: MoEConfig) -> Router:
    """Build the router that `config.router` names.

    Raises:
      ValueError: if there is none of that name, with the nearest one, or if the config does not suit it.
    """
    check_choice("router", config.router, ROUTERS)
    return ROUTERS[config.router](config)


def route(
    logits_TE: Float[Array, "*G T E"],
    config: MoEConfig,
    *,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Decision:
    """Decide each token's experts from its scores alone, as the router of `config` does in evaluation.

    Raises:
      ValueError: if the scores are not for `config.num_experts` experts, or the router does not decide by
        scores of tokens for experts ("hash", "soft_moe").
    """
    if logits_TE.shape[-1] != config.num_experts:
        raise ValueError(
            f"The logits score {logits_TE.shape[-1]} experts, but num_experts is {config.num_experts}; "
            "make the two equal."
        )
    return make_router(config).choose(logits_TE, mask=mask, bias=bias)
