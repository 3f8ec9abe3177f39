"""What a token does when its expert is full and it may not simply be dropped: it takes its next choice."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from switchmoe.config import DropOrder
from switchmoe.dispatching.slots import seating_order
from switchmoe.dispatching.varying import vary_alike
from switchmoe.routing.base import Routing
from switchmoe.shapes import Array, Int


@partial(jax.jit, static_argnames=("capacity", "drop_order"))
def take_next_choice(
    routing: Routing,
    capacity: int,
    drop_order: DropOrder = "choice",
    limit_G: Int[Array, "*G"] | None = None,
) -> Int[Array, "*G T K"]:
    """Send each choice whose expert is full to the token's best expert that still has a seat.

    Choices take their turn in the drop order, one after the other, as the seats are given out: a choice keeps
    its expert if there is a seat at it, else it gets the expert with the highest score that has one and that
    the token does not hold yet (ties go to the lowest index; a balance bias is not looked at). Where no
    expert is left it keeps its own, and is dropped. Choices that are not used (expert E) stay so, and masked
    tokens take no seat. With `limit_G` an expert has only so many seats in a group.

    Returns the experts [*G, T, K] that every choice ends at, whose weights are the router's `weigh`. T * K
    steps that can't run side by side: causal wherever the drop order is, but slow on an accelerator.

    Source: "no token left behind", Switch Transformers, appendix B, https://arxiv.org/abs/2101.03961, which
    repeats whole rounds instead, so that later tokens' first choices go before earlier ones' second.
    """
    move = partial(_move_group, capacity=capacity, drop_order=drop_order)
    for _ in routing.mask_GT.shape[:-1]:
        move = jax.vmap(move)
    return move(routing, limit_G)


def _move_group(
    routing: Routing, limit: Int[Array, ""] | None, *, capacity: int, drop_order: DropOrder
) -> Int[Array, "T K"]:
    num_tokens, k = routing.expert_GTK.shape
    num_experts = routing.logits_GTE.shape[-1]
    score_TE = lax.stop_gradient(routing.logits_GTE)
    turn_T = seating_order(routing, drop_order)
    token_TK = jnp.broadcast_to(turn_T[:, None], (num_tokens, k))
    choice_TK = jnp.broadcast_to(jnp.arange(k), (num_tokens, k))
    pattern = "T K -> (T K)" if drop_order == "token" else "T K -> (K T)"
    queue = (rearrange(token_TK, pattern), rearrange(choice_TK, pattern))
    expert_E = jnp.arange(num_experts)

    def take(state, turn):
        free_E, held_TK = state
        token, choice = turn
        wish = routing.expert_GTK[token, choice]
        mine_K = held_TK[token]
        held_E = (mine_K[:, None] == expert_E).any(axis=0)
        open_E = (free_E > 0) & ~held_E
        best = jnp.argmax(jnp.where(open_E, score_TE[token], -jnp.inf))
        # Scores may be minus infinity too, and then the argmax may name an expert that is not open.
        best = jnp.where(open_E[best], best, jnp.argmax(open_E))
        asks = routing.mask_GT[token] & (wish < num_experts)
        has_wish = open_E[jnp.minimum(wish, num_experts - 1)]
        seated = asks & open_E.any()
        # Without a seat it keeps a name of a full expert, so that it counts as dropped: not one it holds.
        full = jnp.where(asks & held_E[jnp.minimum(wish, num_experts - 1)], jnp.argmin(held_E), wish)
        got = jnp.where(seated, jnp.where(has_wish, wish, best), full).astype(jnp.int32)
        free_E = free_E - (seated & (expert_E == got))
        held_TK = held_TK.at[token, choice].set(jnp.where(seated, got, num_experts))
        return (free_E, held_TK), got

    seats = capacity if limit is None else limit
    # Nobody holds anything: expert E stands for nothing.
    free_E, held_TK = (
        jnp.full(num_experts, seats, jnp.int32),
        jnp.full((num_tokens, k), num_experts, jnp.int32),
    )
    start = tuple(vary_alike(free_E, held_TK, routing.expert_GTK, routing.logits_GTE, routing.mask_GT)[:2])
    _, got_N = lax.scan(take, start, queue)
    source = "(T K) -> T K" if drop_order == "token" else "(K T) -> T K"
    got_TK = rearrange(got_N, source, T=num_tokens)
    return jnp.zeros_like(got_TK).at[turn_T].set(got_TK, unique_indices=True)
