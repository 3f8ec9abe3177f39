"""Tokens to a decision: which experts each token goes to, and with which weight."""

from switchmoe.config import MoEConfig, check_choice
from switchmoe.routing.base import MoEAux, Router, Routing, add_aux, group_keys
from switchmoe.routing.blind import balanced, random
from switchmoe.routing.gshard import choose_gshard, gshard
from switchmoe.routing.losses import balance_loss, importance_loss, z_loss
from switchmoe.routing.metrics import aux_loss, summarize
from switchmoe.routing.sigmoid import choose_sigmoid, sigmoid, update_bias
from switchmoe.routing.top_k import choose_top_k, choose_top_k_then_softmax, switch, top_k, top_k_then_softmax
from switchmoe.shapes import Array, Bool, Float

__all__ = [
    "ROUTERS",
    "MoEAux",
    "Router",
    "Routing",
    "add_aux",
    "aux_loss",
    "balance_loss",
    "balanced",
    "choose_gshard",
    "choose_sigmoid",
    "choose_top_k",
    "choose_top_k_then_softmax",
    "group_keys",
    "gshard",
    "importance_loss",
    "make_router",
    "random",
    "route",
    "sigmoid",
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
) -> Routing:
    """Decide each token's experts from its scores alone, as the router that `config` names does.

    Raises:
      ValueError: if the scores are not for `config.num_experts` experts.
    """
    if logits_TE.shape[-1] != config.num_experts:
        raise ValueError(
            f"The logits score {logits_TE.shape[-1]} experts, but num_experts is {config.num_experts}; "
            "make the two equal."
        )
    return make_router(config).choose(logits_TE, mask=mask, bias=bias)
