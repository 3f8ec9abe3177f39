"""The layer's experts across devices: one function a transport, all for use inside `jax.shard_map`.

Each takes the tokens and the plan of this device's groups, and the weights of this device's experts, and
returns what all experts say to these tokens:

    all_to_all          seats travel to their expert and back: 2 all-to-alls, 2 more in the gradient
    all_gather          every device sees the tokens of all and serves its own experts'; sums are scattered
    ragged_all_to_all   dropless rows travel, as many as there are
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from switchmoe.config import Dispatch
from switchmoe.dispatching.dropless import SortPlan, combine_sorted, dispatch_sorted, sort_by_expert
from switchmoe.dispatching.gather import take_tokens
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.execution import Executor, ExpertFn, Plan, empty_seats, fill_seats
from switchmoe.experts import ExpertParams
from switchmoe.parallel.ragged import Traffic, which_run
from switchmoe.routing import SoftMix
from switchmoe.shapes import Array, Float, Int
from switchmoe.sorted_experts import origins

# What travelled, by the names that `jax.checkpoint` policies know it under.
DISPATCHED, RETURNED = "moe_dispatched", "moe_returned"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where on the mesh a device stands, as its executor has to know it; made inside `jax.shard_map`.

    Attributes:
      axis: the mesh axis over which the experts are split.
      devices: how many devices it has.
      num_experts: experts on one of them.
      group_SG: the index in the whole batch of each group of each device of the axis.
      dispatch: how seats are filled.
      chunks: parts of the groups that travel one after the other.
      room: rows that fit into the buffer of dropless rows, over those a device sends; None for all.
      native: whether the platform has a ragged all-to-all.
    """

    axis: str
    devices: int
    num_experts: int
    group_SG: Int[Array, "S G"]
    dispatch: Dispatch = "gather"
    chunks: int = 1
    room: float | None = None
    native: bool = False

    def expert_E(self) -> Int[Array, " E"]:
        """Name this device's experts, out of all."""
        return self.first_expert() + jnp.arange(self.num_experts)

    def first_expert(self) -> Int[Array, ""]:
        """Name the first of them."""
        return lax.axis_index(self.axis) * self.num_experts

    def buffer_rows(self, sent: int) -> int:
        """Say for how many dropless rows there is room, if every device sends `sent`."""
        most = self.devices * sent
        return most if self.room is None else min(most, max(1, int(-(-self.room * sent // 1))))


def all_to_all(
    place: Place, x_GTD: Float[Array, "G T D"], plan: Plan, expert_fn: ExpertFn, expert_params: ExpertParams
) -> Float[Array, "G T D"]:
    """Send every seat to the device of its expert, and what the expert says back to the token's device."""
    assert not isinstance(plan, SortPlan)

    def serve(x_GTD, plan, group_SG):
        x_EGCD = fill_seats(x_GTD, plan, place.dispatch)
        x_EGCD = lax.all_to_all(x_EGCD, place.axis, split_axis=0, concat_axis=1, tiled=True)
        x_EGCD = checkpoint_name(x_EGCD, DISPATCHED)
        y_EGCD = expert_fn(expert_params, x_EGCD, group_G=group_SG.reshape(-1), expert_E=place.expert_E())
        y_EGCD = lax.all_to_all(y_EGCD, place.axis, split_axis=1, concat_axis=0, tiled=True)
        return empty_seats(checkpoint_name(y_EGCD, RETURNED), plan, place.dispatch)

    return _in_chunks(serve, place, x_GTD, plan)


def all_gather(
    place: Place, x_GTD: Float[Array, "G T D"], plan: Plan, expert_fn: ExpertFn, expert_params: ExpertParams
) -> Float[Array, "G T D"]:
    """Show every token to all devices; each serves its own experts' tokens, and the sums go back."""

    def gather(a):
        return lax.all_gather(a, place.axis, axis=0, tiled=True)

    def serve(x_GTD, plan, group_SG):
        x_GTD = checkpoint_name(gather(x_GTD), DISPATCHED)
        group_G = group_SG.reshape(-1)
        if isinstance(plan, SortPlan):
            own = _own_rows(place, *(gather(a) for a in _choices(plan)))
            y_RD = expert_fn(expert_params, dispatch_sorted(x_GTD, own), own, group_G=group_G)
            y_GTD = combine_sorted(y_RD, own, len(x_GTD))
        else:
            own = _own_seats(place, plan)
            x_EGCD = fill_seats(x_GTD, own, place.dispatch)
            y_EGCD = expert_fn(expert_params, x_EGCD, group_G=group_G, expert_E=place.expert_E())
            y_GTD = empty_seats(y_EGCD, own, place.dispatch)
        y_GTD = lax.psum_scatter(y_GTD, place.axis, scatter_dimension=0, tiled=True)
        return checkpoint_name(y_GTD, RETURNED)

    return _in_chunks(serve, place, x_GTD, plan)


def ragged_all_to_all(
    place: Place, x_GTD: Float[Array, "G T D"], plan: Plan, expert_fn: ExpertFn, expert_params: ExpertParams
) -> Float[Array, "G T D"]:
    """Send every row to the device of its expert, as many as there are, and what it says back.

    What comes is in the order of the devices it came from, so it is sorted by expert once more.
    """
    assert isinstance(plan, SortPlan)
    size_SNE = _sizes(place, plan)
    traffic = Traffic(place.axis, size_SNE.sum(axis=-1), place.native)
    x_RD = dispatch_sorted(x_GTD, plan)
    room = place.buffer_rows(len(x_RD))
    came_PD = checkpoint_name(traffic.send(x_RD, room), DISPATCHED)
    origin_P2 = traffic.send(origins(plan, place.group_SG[lax.axis_index(place.axis)]), room)

    end_B = jnp.cumsum(size_SNE[:, lax.axis_index(place.axis)].reshape(-1))  # runs of one sender and expert
    run_P = which_run(end_B, room)
    expert_P = jnp.where(run_P < end_B.size, run_P % place.num_experts, place.num_experts)
    own = sort_by_expert(expert_P[:, None], jnp.ones((room, 1)), place.num_experts)
    x_PD = take_tokens(came_PD, own.token_R, own.row_NK)
    y_PD = expert_fn(expert_params, x_PD, own, origin_R2=origin_P2[own.choice_R])
    y_PD = take_tokens(y_PD, own.row_NK[:, 0], own.token_R[:, None])
    y_RD = checkpoint_name(traffic.send_back(y_PD, len(x_RD)), RETURNED)
    return combine_sorted(y_RD, plan, len(x_GTD))


EXECUTORS: dict[str, Callable[..., Array]] = {
    "all_to_all": all_to_all,
    "all_gather": all_gather,
    "ragged_all_to_all": ragged_all_to_all,
}


def make_executor(name: str, place: Place) -> tuple[Executor, Callable[[Plan], Plan]]:
    """Return the executor of that name at a place, and what leaves out of a plan what it has no room for."""
    whole = name != "ragged_all_to_all" or place.room is None
    return partial(EXECUTORS[name], place), (lambda plan: plan) if whole else partial(_admit, place)


def _in_chunks(serve: Callable[..., Array], place: Place, x_GTD: Array, plan: Plan) -> Array:
    """Serve the groups in equal parts that do not depend on each other, so that they may overlap in time."""
    if place.chunks == 1:
        return serve(x_GTD, plan, place.group_SG)
    size, parts = len(x_GTD) // place.chunks, []
    for first in range(0, len(x_GTD), size):
        part = slice(first, first + size)
        own = jax.tree.map(lambda a, part=part: a[part], plan)
        parts.append(serve(x_GTD[part], own, place.group_SG[:, part]))
    return jnp.concatenate(parts)


def _own_seats(place: Place, plan: SlotPlan | SoftMix) -> SlotPlan | SoftMix:
    """Collect from all devices the part of their plans that is about this device's experts."""

    def own(table, experts_at):
        return lax.all_to_all(table, place.axis, split_axis=experts_at, concat_axis=0, tiled=True)

    if isinstance(plan, SoftMix):
        return plan._replace(dispatch_GTEC=own(plan.dispatch_GTEC, 2), combine_GTEC=own(plan.combine_GTEC, 2))
    slot_GTK = lax.all_gather(plan.slot_GTK, place.axis, axis=0, tiled=True)
    seats = plan.token_GEC.shape[-1]
    slot_GTK = slot_GTK - place.first_expert() * seats
    kept_GTK = (slot_GTK >= 0) & (slot_GTK < place.num_experts * seats)
    slot_GTK = jnp.where(kept_GTK, slot_GTK, place.num_experts * seats)
    return SlotPlan(own(plan.token_GEC, 1), own(plan.weight_GEC, 1), slot_GTK, kept_GTK)


def _own_rows(place: Place, expert_NK: Int[Array, "N K"], weight_NK: Float[Array, "N K"]) -> SortPlan:
    """Sort the choices of all devices that name an expert of this one."""
    expert_NK = expert_NK - place.first_expert()
    mine_NK = (expert_NK >= 0) & (expert_NK < place.num_experts)
    return sort_by_expert(jnp.where(mine_NK, expert_NK, place.num_experts), weight_NK, place.num_experts)


def _choices(plan: SortPlan) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """Read from a plan each token's experts and their weights; E for a choice that is not used."""
    expert_R = which_run(jnp.cumsum(plan.size_E), plan.token_R.size)
    expert_NK = expert_R.at[plan.row_NK].get(mode="fill", fill_value=plan.size_E.size)
    return expert_NK, plan.weight_R.at[plan.row_NK].get(mode="fill", fill_value=0)


def _sizes(place: Place, plan: SortPlan) -> Int[Array, "S N E"]:
    """Count the rows from each device to each expert of each device."""
    size_SE = lax.all_gather(plan.size_E, place.axis)
    return size_SE.reshape(place.devices, place.devices, place.num_experts)


def _admit(place: Place, plan: Plan) -> Plan:
    """Leave out of a dropless plan the rows that find no room at their expert's device.

    Room is given in the order of the senders, then of the experts, then of the tokens.
    """
    assert isinstance(plan, SortPlan)
    room = place.buffer_rows(plan.token_R.size)
    size_SNE = _sizes(place, plan)
    size_NB = jnp.moveaxis(size_SNE, 1, 0).reshape(place.devices, -1)  # runs of one sender and expert
    fits_NB = jnp.clip(room - (jnp.cumsum(size_NB, axis=1) - size_NB), 0, size_NB)
    fits_NSE = fits_NB.reshape(place.devices, place.devices, place.num_experts)
    fits_E = fits_NSE[:, lax.axis_index(place.axis)].reshape(-1)
    expert_NK, weight_NK = _choices(plan)
    start_E = jnp.cumsum(plan.size_E) - plan.size_E
    last_E = jnp.append(start_E + fits_E, 0)  # expert E, a choice that is not used, has no row
    expert_NK = jnp.where(plan.row_NK < last_E[expert_NK], expert_NK, fits_E.size)
    return sort_by_expert(expert_NK, weight_NK, fits_E.size)
