"""BASE layers: in training, the assignment of tokens to experts that is best among those that are even."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, refuse_unread
from switchmoe.routing.groupwise import groupwise_router
from switchmoe.routing.linear import pick_experts
from switchmoe.routing.sigmoid import choose_sigmoid, weigh_by_sigmoid
from switchmoe.shapes import Array, Bool, Float, Int

TOLERANCE = 1e-3  # the last bidding step, as a share of the widest range of a token's scores
MAX_ROUNDS = 2000


class _Auction(NamedTuple):
    """Where an auction stands. P are bidders: tokens, and as many fillers as seats would stay empty.

    Attributes:
      expert_P: where each bidder sits; E where it has no seat.
      bid_P: what it pays there.
      floor_E: the price of a seat that nobody has taken yet.
      answer_P: the last assignment in which everybody had a seat; E's before there is one.
      step: by how much a bid goes beyond what the seat is worth to the bidder.
      rounds: how often was bid.
    """

    expert_P: Int[Array, " P"]
    bid_P: Float[Array, " P"]
    floor_E: Float[Array, " E"]
    answer_P: Int[Array, " P"]
    step: Float[Array, ""]
    rounds: Int[Array, ""]


@partial(jax.jit, static_argnames=("tolerance", "max_rounds"))
def assign_evenly(
    scores_TE: Float[Array, "*G T E"],
    mask_T: Bool[Array, "*G T"],
    *,
    tolerance: float = TOLERANCE,
    max_rounds: int = MAX_ROUNDS,
) -> Int[Array, "*G T"]:
    """Give each token one expert, so that no expert gets more than its share and the total score is highest.

    An expert's share is ceil(n / E) of the n real tokens of a group. Tokens bid for seats: who has none bids
    for the expert whose score less its price is best, as much more as the second best allows and one step
    beyond; an expert keeps its highest bids. Once everybody sits, prices stay and bidding begins anew with a
    quarter of the step, down to `tolerance` times the widest range of scores that a token has. The total is
    then within n + E - 1 such steps of the highest, and most often much nearer. After `max_rounds` rounds of
    bidding the last complete assignment counts, or else whoever stands gets a seat that is free: the loads
    are even whatever happens. A masked token gets expert E. No gradient.

    It takes tens to hundreds of rounds one after the other, each a sort: much more than other routers do.

    Source: Bertsekas & Castanon 1989, the auction algorithm for the transportation problem,
    https://doi.org/10.1007/BF02216923; BASE layers solve the same problem.
    """
    scores_TE = lax.stop_gradient(scores_TE.astype(jnp.float32))
    assign = partial(_assign_group, tolerance=tolerance, max_rounds=max_rounds)
    for _ in mask_T.shape[:-1]:
        assign = jax.vmap(assign)
    return assign(scores_TE, mask_T)


def _assign_group(
    score_TE: Float[Array, "T E"], mask_T: Bool[Array, " T"], *, tolerance: float, max_rounds: int
) -> Int[Array, " T"]:
    num_tokens, num_experts = score_TE.shape
    if num_experts == 1:
        return jnp.where(mask_T, 0, 1)
    seats = (mask_T.sum() + num_experts - 1) // num_experts
    # A token's seat is worth at most 0 to it. Fillers, to whom all experts are the same, take the seats that
    # would stay empty: only where all seats are taken are prices of an earlier step a legal start.
    worth_TE = jnp.where(mask_T[:, None], score_TE - score_TE.max(axis=-1, keepdims=True), 0.0)
    worth_PE = jnp.concatenate([worth_TE, jnp.zeros_like(worth_TE, shape=(num_experts - 1, num_experts))])
    fills = jnp.arange(num_experts - 1) < seats * num_experts - mask_T.sum()
    bids_P = jnp.concatenate([mask_T, fills])
    width = jnp.maximum(-worth_PE.min(), 1e-6)  # above 0, so that scores that are all equal need few rounds
    last_step = tolerance * width

    # From the bidders and not a constant, so that inside shard_map it varies as they do.
    nobody_P = jnp.where(bids_P, num_experts, num_experts)
    start = _Auction(
        expert_P=nobody_P,
        bid_P=worth_PE[:, 0],
        floor_E=jnp.zeros_like(worth_PE[0]),
        answer_P=nobody_P,
        step=width / 4,
        rounds=jnp.zeros_like(seats),
    )

    def goes_on(state: _Auction):
        return (state.rounds < max_rounds) & (state.step > last_step / 4)

    def bid_once(state: _Auction):
        price_E = _price(state, seats)
        expert_P, bid_P = _bid(worth_PE, price_E, state, bids_P)
        expert_P = _keep_highest(expert_P, bid_P, seats, num_experts)
        state = state._replace(expert_P=expert_P, bid_P=bid_P, rounds=state.rounds + 1)
        done = ~jnp.any(bids_P & (expert_P == num_experts))
        anew = state._replace(
            expert_P=nobody_P, floor_E=_price(state, seats), answer_P=expert_P, step=state.step / 4
        )
        return jax.tree.map(partial(jnp.where, done), anew, state)

    end = lax.while_loop(goes_on, bid_once, start)
    expert_P = jnp.where((bids_P & (end.answer_P == num_experts)).any(), end.expert_P, end.answer_P)
    return jnp.where(mask_T, _seat_the_rest(expert_P, bids_P, seats, num_experts)[:num_tokens], num_experts)


def _price(state: _Auction, seats: Int[Array, ""]) -> Float[Array, " E"]:
    """What a seat at each expert costs: its lowest bid, or the floor while a seat is free."""
    at_PE = state.expert_P[:, None] == jnp.arange(state.floor_E.size)
    lowest_E = jnp.where(at_PE, state.bid_P[:, None], jnp.inf).min(axis=0)
    return jnp.where(at_PE.sum(axis=0) >= seats, lowest_E, state.floor_E)


def _bid(
    worth_PE: Float[Array, "P E"], price_E: Float[Array, " E"], state: _Auction, bids_P: Bool[Array, " P"]
) -> tuple[Int[Array, " P"], Float[Array, " P"]]:
    """Let whoever stands bid for its best expert, up to where the second best would do as well and a step."""
    num_experts = price_E.size
    gain_PE = worth_PE - price_E
    best_P = jnp.argmax(gain_PE, axis=-1).astype(state.expert_P.dtype)
    is_best_PE = best_P[:, None] == jnp.arange(num_experts)
    second_P = jnp.where(is_best_PE, -jnp.inf, gain_PE).max(axis=-1)
    worth_P = jnp.where(is_best_PE, worth_PE, 0.0).sum(axis=-1)
    stands_P = bids_P & (state.expert_P == num_experts)
    bid_P = jnp.where(stands_P, worth_P - second_P + state.step, state.bid_P)
    return jnp.where(stands_P, best_P, state.expert_P), bid_P


def _keep_highest(
    expert_P: Int[Array, " P"], bid_P: Float[Array, " P"], seats: Int[Array, ""], num_experts: int
) -> Int[Array, " P"]:
    """Leave each expert its `seats` highest bids; who is outbid gets expert E."""
    who_P = jnp.arange(expert_P.size)
    queue_P, _, who_P = lax.sort((expert_P, -bid_P, who_P), num_keys=2)
    place_P = jnp.arange(expert_P.size) - jnp.searchsorted(queue_P, queue_P)
    kept_P = jnp.where(place_P < seats, queue_P, num_experts)
    return jnp.zeros_like(expert_P).at[who_P].set(kept_P, unique_indices=True)


def _seat_the_rest(
    expert_P: Int[Array, " P"], bids_P: Bool[Array, " P"], seats: Int[Array, ""], num_experts: int
) -> Int[Array, " P"]:
    """Give the seats that are free, from the lowest expert on, to the bidders that stand."""
    stands_P = bids_P & (expert_P == num_experts)
    free_E = seats - jnp.sum(expert_P[:, None] == jnp.arange(num_experts), axis=0)
    turn_P = jnp.cumsum(stands_P) - 1
    found_P = jnp.searchsorted(jnp.cumsum(free_E), turn_P, side="right")
    return jnp.where(stands_P, found_P, expert_P).astype(expert_P.dtype)


def choose_base(
    logits_TE: Float[Array, "*G T E"], *, evenly: bool = True, mask: Bool[Array, "*G T"] | None = None
) -> Routing:
    """Send each token to one expert, evenly and with the highest total score, weighted by its sigmoid.

    `evenly`, as in training, makes the assignment of all real tokens of a group at once (see
    `assign_evenly`), so a token's expert depends on the others, and a masked token gets expert E. Otherwise,
    as in evaluation, each token takes its own highest score; ties go to the lowest index. The weight has a
    gradient, the assignment has none. `probs_GTE` are the sigmoids divided by their sum, as `choose_sigmoid`
    has them. Everything returned is float32.

    Source: BASE Layers, sections 2.1 and 2.2, https://arxiv.org/abs/2103.16716.
    """
    routing = choose_sigmoid(logits_TE, k=1, mask=mask)
    if evenly:
        expert_TK = assign_evenly(routing.logits_GTE, routing.mask_GT)[..., None]
    else:
        expert_TK = pick_experts(routing.logits_GTE, 1)
    return routing._replace(expert_GTK=expert_TK, weight_GTK=weigh_by_sigmoid(routing.logits_GTE, expert_TK))


def base_layer(config: MoEConfig) -> Router:
    """Send each token to one expert, in training as evenly as can be (see `choose_base`).

    In training nothing is dropped at a capacity factor of 1. A balance loss is not needed: `balance_coef=0`
    is the paper's. A balance bias is not read: in training the assignment would undo it.
    """
    refuse_unread(config, "jitter", "input_dropout", "overflow")
    if config.top_k != 1:
        raise ValueError(
            f"router='base' assigns each token to one expert, but top_k={config.top_k}; "
            "set top_k=1, or use router='sinkhorn'."
        )

    def decide(logits_TE, *, train, mask):
        return choose_base(logits_TE, evenly=train, mask=mask)

    leak = "in training a later token can move an earlier one to another expert"
    return groupwise_router(config, decide, weigh_by_sigmoid, leak=leak)
