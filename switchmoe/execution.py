"""From a decision about tokens to their outputs, when every expert is on this device."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange

from switchmoe.config import Dispatch, MoEConfig
from switchmoe.dispatching.dropless import SortPlan, combine_sorted, dispatch_sorted, sort_choices
from switchmoe.dispatching.einsum import combine_einsum, dispatch_einsum
from switchmoe.dispatching.gather import combine_by_expert, dispatch_by_expert
from switchmoe.dispatching.mix import mix_into_seats, mix_out_of_seats
from switchmoe.dispatching.overflow import take_next_choice
from switchmoe.dispatching.slots import SlotPlan, assign_slots
from switchmoe.experts import ExpertParams
from switchmoe.routing import Decision, ExpertChoice, MoEAux, Router, SoftMix
from switchmoe.seats import expert_seats
from switchmoe.shapes import Array, Float, Int

Plan = SlotPlan | SortPlan | SoftMix
# On seats, `(params, x_EGCD) -> y_EGCD`, with `group_G` and `expert_E` for other groups and experts than this
# device's own; on the rows of a SortPlan, `(params, x_RD, plan) -> y_RD`, with `origin_R2` for other rows.
ExpertFn = Callable[..., Array]
Executor = Callable[[Float[Array, "G T D"], Plan, ExpertFn, ExpertParams], Float[Array, "G T D"]]


class Shard(NamedTuple):
    """What a layer is told where its tokens, or its experts, are only some of all; by default they are all.

    Attributes:
      first_group: index of the first group in the whole batch, for noise that does not follow the devices.
      part_of_F: which part of the experts' hidden features is here, and of how many equal ones; the output is
        then a part of a sum.
      to_experts: what tokens pass through between the router and all experts, shared ones too.
      execute: carries tokens to experts and back; None for `execute_local`.
      admit: leaves out of a plan what the executor has no room for.
      sum_across: adds sums over devices.
      checked: whether the arguments were looked at already, as a whole.
    """

    first_group: Int[Array, ""] | int = 0
    part_of_F: tuple[Int[Array, ""] | int, int] = (0, 1)
    to_experts: Callable[[Array], Array] = lambda x_GTD: x_GTD
    execute: Executor | None = None
    admit: Callable[[Plan], Plan] = lambda plan: plan
    sum_across: Callable[[MoEAux], MoEAux] = lambda aux: aux
    checked: bool = False


WHOLE = Shard()


def make_plan(
    decision: Decision,
    router: Router,
    config: MoEConfig,
    *,
    train: bool,
    seats_N: tuple[int, ...] | None = None,
) -> tuple[Decision, Plan]:
    """Say how each token gets to the experts that the router decided on.

    Returns the decision as it is carried out, which differs from the router's where `config.overflow` sends
    tokens on to their next choice, and the plan: seats, an order of rows (dropless), or for Soft MoE the
    mixture itself. `seats_N` comes from `seats_by_tokens`, where padding is to bring no seats.
    """
    if isinstance(decision, SoftMix):
        return decision, decision
    if isinstance(decision, ExpertChoice):
        none_GTK = jnp.zeros((*decision.mask_GT.shape, 0), jnp.int32)
        return decision, SlotPlan(decision.token_GEC, decision.weight_GEC, none_GTK, none_GTK > 0)
    if config.dispatch == "dropless":
        return decision, sort_choices(decision)
    seats = expert_seats(config, tokens=decision.mask_GT.shape[-1], train=train)
    limit_G = None if seats_N is None else jnp.asarray(seats_N, jnp.int32)[decision.mask_GT.sum(axis=-1)]
    if config.overflow == "next":
        assert router.weigh is not None  # a router of choices can weigh them
        expert_GTK = take_next_choice(decision, seats, config.drop_order, limit_G)
        # Who was not moved keeps its weights, which may know more than the experts' names (GShard's do).
        moved_GT = jnp.any(expert_GTK != decision.expert_GTK, axis=-1, keepdims=True)
        weight_GTK = router.weigh(decision.logits_GTE, expert_GTK)
        weight_GTK = jnp.where(moved_GT, weight_GTK, decision.weight_GTK)
        decision = decision._replace(expert_GTK=expert_GTK, weight_GTK=weight_GTK)
    return decision, assign_slots(decision, seats, config.drop_order, limit_G)


def execute_local(
    x_GTD: Float[Array, "G T D"],
    plan: Plan,
    expert_fn: ExpertFn,
    expert_params: ExpertParams,
    *,
    dispatch: Dispatch = "gather",
) -> Float[Array, "G T D"]:
    """Carry each token to its experts and back when every expert is on this device.

    `dispatch` chooses between the two ways to fill the seats of a `SlotPlan`; another plan has one way only.
    """
    if isinstance(plan, SortPlan):
        return combine_sorted(expert_fn(expert_params, dispatch_sorted(x_GTD, plan), plan), plan, len(x_GTD))
    x_EGCD = fill_seats(x_GTD, plan, dispatch)
    return empty_seats(expert_fn(expert_params, x_EGCD), plan, dispatch)


def fill_seats(
    x_GTD: Float[Array, "G T D"], plan: SlotPlan | SoftMix, dispatch: Dispatch = "gather"
) -> Float[Array, "E G C D"]:
    """Put into each expert's seats what a plan says: a token, or a mixture of tokens."""
    if isinstance(plan, SoftMix):
        return mix_into_seats(x_GTD, plan)
    if dispatch == "einsum":
        return rearrange(dispatch_einsum(x_GTD, plan), "G E C D -> E G C D")
    return dispatch_by_expert(x_GTD, plan)


def empty_seats(
    y_EGCD: Float[Array, "E G C D"], plan: SlotPlan | SoftMix, dispatch: Dispatch = "gather"
) -> Float[Array, "G T D"]:
    """Give each token the sum, or the mixture, of what the experts made of its seats."""
    if isinstance(plan, SoftMix):
        return mix_out_of_seats(y_EGCD, plan)
    if dispatch == "einsum":
        return combine_einsum(rearrange(y_EGCD, "E G C D -> G E C D"), plan)
    return combine_by_expert(y_EGCD, plan)
