"""Tokens to a decision: which experts each token goes to, and with which weight."""

from switchmoe.config import MoEConfig, check_choice
from switchmoe.routing.base import MoEAux, Router, Routing, add_aux, group_keys
from switchmoe.routing.losses import balance_loss, importance_loss, z_loss
from switchmoe.routing.metrics import aux_loss, summarize
from switchmoe.routing.top_k import choose_top_k, switch, top_k
from switchmoe.shapes import Array, Bool, Float

__all__ = [
    "ROUTERS",
    "MoEAux",
    "Router",
    "Routing",
    "add_aux",
    "aux_loss",
    "balance_loss",
    "choose_top_k",
    "group_keys",
    "importance_loss",
    "make_router",
    "route",
    "summarize",
    "switch",
    "top_k",
    "z_loss",
]

ROUTERS = {
    "switch": switch,
    "top_k": top_k,
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
