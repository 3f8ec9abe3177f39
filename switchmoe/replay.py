"""Where tokens went, written down, and sent there again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.dispatching.dropless import SortPlan
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.routing import Decision, ExpertChoice, Router, Routing, SoftMix
from switchmoe.shapes import Array, Bool, Float, Int


class Trace(NamedTuple):
    """Where each token went, in the shape of the rows it came in.

    K is the router's k. Where tokens do not choose experts it is E, expert by expert: with expert choice, E
    in the place of an expert that did not choose the token; with Soft MoE, every expert, with its share.

    Attributes:
      expert_SK: the experts each token chose, best first; E where a choice is not used.
      weight_SK: the weight of each choice.
      kept_SK: True where the choice got a seat.
    """

    expert_SK: Int[Array, "*B S K"]
    weight_SK: Float[Array, "*B S K"]
    kept_SK: Bool[Array, "*B S K"]


def replay_choices(
    decision: Decision, router: Router, config: MoEConfig, expert_GTK: Int[Array, "G T K"]
) -> Routing:
    """Put given experts in the place of a router's choices, and weigh them by its scores."""
    if not isinstance(decision, Routing) or router.weigh is None:
        raise ValueError(
            f"router={config.router!r} does not let tokens choose experts, so there are no choices to "
            "replay; leave replay=None."
        )
    if expert_GTK.shape[-1] != config.top_k or not jnp.issubdtype(expert_GTK.dtype, jnp.integer):
        raise ValueError(
            f"replay holds {expert_GTK.shape[-1]} choices a token, as {expert_GTK.dtype}, but top_k is "
            f"{config.top_k}; replay whole numbers from a trace of a layer with this config."
        )
    is_expert_GTK = (expert_GTK >= 0) & (expert_GTK < config.num_experts)
    expert_GTK = jnp.where(is_expert_GTK, expert_GTK, config.num_experts).astype(jnp.int32)
    weight_GTK = router.weigh(decision.logits_GTE, expert_GTK)
    return decision._replace(expert_GTK=expert_GTK, weight_GTK=weight_GTK)


def where_tokens_went(
    decision: Decision, plan: SlotPlan | SortPlan | SoftMix
) -> tuple[Int[Array, "G T K"], Float[Array, "G T K"], Bool[Array, "G T K"]]:
    """Say which experts each token went to, with which weight, and whether there was a seat for it."""
    num_tokens, num_experts = decision.probs_GTE.shape[-2:]
    if isinstance(decision, Routing):
        if isinstance(plan, SlotPlan):
            return decision.expert_GTK, decision.weight_GTK, plan.kept_GTK
        assert isinstance(plan, SortPlan)
        kept_GTK = (plan.row_NK < plan.token_R.size).reshape(decision.expert_GTK.shape)
        return decision.expert_GTK, decision.weight_GTK, kept_GTK
    expert_GTE = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), decision.probs_GTE.shape)
    if not isinstance(decision, ExpertChoice):
        return expert_GTE, decision.probs_GTE, jnp.broadcast_to(decision.mask_GT[..., None], expert_GTE.shape)

    def weigh(token_EC, weight_EC):  # each token's weight at each expert, 0 where it was not chosen
        expert_E = jnp.arange(num_experts)[:, None]
        sits_TE = jnp.zeros((num_tokens, num_experts), bool).at[token_EC, expert_E].set(True, mode="drop")
        zeros_TE = jnp.zeros((num_tokens, num_experts))
        return sits_TE, zeros_TE.at[token_EC, expert_E].set(weight_EC, mode="drop")

    sits_GTE, weight_GTE = jax.vmap(weigh)(decision.token_GEC, decision.weight_GEC)
    return jnp.where(sits_GTE, expert_GTE, num_experts), weight_GTE, sits_GTE
