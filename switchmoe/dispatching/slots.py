"""A decision to a seating plan: which token sits in which seat of which expert, and who is dropped."""

from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from switchmoe.config import DropOrder, check_choice
from switchmoe.routing.base import Routing
from switchmoe.shapes import Array, Bool, Float, Int


class SlotPlan(NamedTuple):
    """Who sits where, and its inverse, so that moving tokens either way is a gather.

    Attributes:
      token_GEC: the token in each seat; T where the seat is empty.
      weight_GEC: the weight of that seat's output in its token's result; 0 where the seat is empty.
      slot_GTK: the seat of each choice, as expert * C + seat; E * C where the choice was dropped or is not
        used, or the token is padding.
      kept_GTK: True where the choice has a seat.
    """

    token_GEC: Int[Array, "*G E C"]
    weight_GEC: Float[Array, "*G E C"]
    slot_GTK: Int[Array, "*G T K"]
    kept_GTK: Bool[Array, "*G T K"]


def assign_slots(
    routing: Routing,
    capacity: int,
    drop_order: DropOrder = "choice",
    limit_G: Int[Array, "*G"] | None = None,
) -> SlotPlan:
    """Seat each token at its experts, in order, until an expert's `capacity` seats are taken.

    Seats are filled without holes. Who is seated first is `drop_order`: "choice" seats every token's first
    choice before any second; "token" seats all choices of a token before the next token's; "priority" is
    "choice" with tokens taken by falling probability of their first choice (V-MoE, arXiv 2106.05974, section
    4.1). Masked tokens, and choices of expert E (not used), take no seat. A group never sees another group's
    tokens; leading dimensions of `routing` are groups. With `limit_G` a group fills only so many seats of an
    expert.

    In a causal model "priority" lets later tokens decide whether an earlier one is dropped, and so does
    "choice" with k > 1: use "token" there.
    """
    check_choice("drop_order", drop_order, get_args(DropOrder))
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, but an expert needs at least 1 seat.")
    return _seat_groups(routing, limit_G, capacity=capacity, drop_order=drop_order)


@partial(jax.jit, static_argnames=("capacity", "drop_order"))  # or each small step compiles by itself
def _seat_groups(
    routing: Routing, limit_G: Int[Array, "*G"] | None, *, capacity: int, drop_order: DropOrder
) -> SlotPlan:
    seat = partial(_seat_group, capacity=capacity, drop_order=drop_order)
    for _ in routing.mask_GT.shape[:-1]:
        seat = jax.vmap(seat)
    return seat(routing, limit_G)


def seating_order(routing: Routing, drop_order: DropOrder) -> Int[Array, " T"]:
    """Name the token whose turn it is, turn by turn, in one group: by position, or the surest first."""
    if drop_order == "priority":
        return jnp.argsort(-routing.probs_GTE.max(axis=-1), stable=True)
    return jnp.arange(routing.mask_GT.shape[-1])


def _seat_group(
    routing: Routing, limit: Int[Array, ""] | None, *, capacity: int, drop_order: DropOrder
) -> SlotPlan:
    """Seat the tokens of one group.

    A stable sort of all choices by expert puts each expert's queue in one run, so that seat c of expert e is
    entry start_e + c of the sorted list: no [T, E] cumulative sum, and the table needs no scatter.
    """
    num_tokens, k = routing.expert_GTK.shape
    num_experts = routing.probs_GTE.shape[-1]
    usable = capacity if limit is None else limit
    expert_TK = jnp.where(routing.mask_GT[:, None], routing.expert_GTK, num_experts)

    turn_T = seating_order(routing, drop_order)
    token_TK = jnp.broadcast_to(turn_T[:, None], (num_tokens, k))
    pattern = "T K -> (T K)" if drop_order == "token" else "T K -> (K T)"
    queue_N = rearrange(expert_TK[turn_T], pattern)
    token_N = rearrange(token_TK, pattern)

    order_N = jnp.argsort(queue_N, stable=True)
    load_E = jnp.sum(queue_N[:, None] == jnp.arange(num_experts), axis=0)
    start_E = jnp.cumsum(load_E) - load_E

    seat_C = jnp.arange(capacity)
    place_EC = jnp.minimum(start_E[:, None] + seat_C, queue_N.size - 1)
    token_EC = jnp.where(
        seat_C < jnp.minimum(load_E, usable)[:, None], token_N[order_N[place_EC]], num_tokens
    )

    rank_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(order_N.size), unique_indices=True)
    seat_N = rank_N - jnp.append(start_E, 0)[queue_N]
    kept_N = (seat_N < usable) & (queue_N < num_experts)
    slot_N = jnp.where(kept_N, queue_N * capacity + seat_N, num_experts * capacity)

    source = "(T K) -> T K" if drop_order == "token" else "(K T) -> T K"
    slot_TK = rearrange(slot_N, source, T=num_tokens)
    if drop_order == "priority":
        slot_TK = jnp.zeros_like(slot_TK).at[turn_T].set(slot_TK, unique_indices=True)
    weight_R = jnp.zeros(num_experts * capacity, jnp.float32)
    weight_R = weight_R.at[slot_TK.reshape(-1)].set(routing.weight_GTK.reshape(-1), mode="drop")
    return SlotPlan(
        token_GEC=token_EC.astype(jnp.int32),
        weight_GEC=weight_R.reshape(num_experts, capacity),
        slot_GTK=slot_TK.astype(jnp.int32),
        kept_GTK=slot_TK < num_experts * capacity,
    )
