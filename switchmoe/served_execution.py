"""Carry tokens to experts that are laid out for generating on a CPU, and back; idle experts are not read."""

import math
from functools import partial

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from switchmoe.config import Activation, Dispatch
from switchmoe.dispatching.dropless import SortPlan, combine_sorted, dispatch_sorted
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.execution import Plan, empty_seats, fill_seats
from switchmoe.quantized import MOST_BLOCKS, split_in_halves
from switchmoe.served_experts import ServedExpert, ServedExperts
from switchmoe.shapes import Array, Float

take = lax.dynamic_slice_in_dim
# Up to so many tokens an expert is shown 1, 2 or 4 of its own, or all of them: its weights are read once.
FEW, FEWER = 16, (1, 2, 4)
# Rows of an expert that are multiplied at once where there are more, as parts of an even share (which counts
# as between these): what is not filled is wasted, and each size is compiled for each expert.
PARTS, LEAST_PIECE, LARGEST_PIECE = (0.5, 1.0, 1.25, 2.0), 16, 256


def execute_served(
    x_GTD: Float[Array, "G T D"],
    plan: Plan,
    served: ServedExperts,
    *,
    activation: Activation = "relu",
    dispatch: Dispatch = "gather",
) -> Float[Array, "G T D"]:
    """Carry each token to its experts and back, as `execute_local` does, without reading idle experts."""
    experts = served.experts
    if not isinstance(plan, SortPlan):
        return _seated(x_GTD, plan, experts, activation, dispatch)
    num_groups, length, _ = x_GTD.shape
    rows = experts[0].token_axis == 0
    # Turned outside of loops and branches, or XLA makes it a part of each product, which are slower for it.
    if num_groups * length <= FEW:
        x_ND = rearrange(x_GTD, "G T D -> (G T) D")
        y_ND = _few(x_ND, plan, experts, activation) if rows else _few(x_ND.T, plan, experts, activation).T
        return y_ND.reshape(x_GTD.shape)
    x_RD = dispatch_sorted(x_GTD, plan)
    y_RD = (
        _in_pieces(x_RD, plan, experts, activation)
        if rows
        else _in_pieces(x_RD.T, plan, experts, activation).T
    )
    return combine_sorted(y_RD, plan, num_groups)


def _few(
    x: Float[Array, "..."], plan: SortPlan, experts: tuple[ServedExpert, ...], activation: Activation
) -> Float[Array, "..."]:
    """Show each expert that somebody chose its own tokens, or all of them, and weigh what it says."""
    axis = experts[0].token_axis
    num_tokens, num_rows = x.shape[axis], plan.token_R.size
    weight_R = plan.weight_R.astype(x.dtype)
    owner_R = jnp.searchsorted(jnp.cumsum(plan.size_E), jnp.arange(num_rows), side="right")
    # Rows past the last expert's name a token, or an expert, that does not exist.
    weight_EN = jnp.zeros((len(experts), num_tokens), x.dtype)
    weight_EN = weight_EN.at[owner_R, plan.token_R].add(weight_R, mode="drop")
    first_E = jnp.cumsum(plan.size_E) - plan.size_E
    scale = experts[0].w_in.scale_QO
    in_halves = scale is not None and scale.shape[0] <= MOST_BLOCKS
    # Written in halves once for all experts.
    given = split_in_halves(x) if in_halves else x

    def weigh(said, weight):
        return jnp.where(weight != 0, weight * said, 0).astype(x.dtype)

    def show_all(index, expert):
        return weigh(expert(given, activation), jnp.expand_dims(weight_EN[index], 1 - axis))

    def show(count, index, expert):
        row_C = first_E[index] + jnp.arange(count)
        token_C = jnp.where(row_C < first_E[index] + plan.size_E[index], plan.token_R[row_C], num_tokens)
        shown = jnp.take(x, token_C, axis, mode="clip")
        said = expert(split_in_halves(shown) if in_halves else shown, activation)
        # A token may have chosen the expert twice, by two rows.
        weight_CN = jnp.where(token_C[:, None] == jnp.arange(num_tokens), weight_R[row_C][:, None], 0)
        parts = (
            weigh(take(said, place, 1, axis), jnp.expand_dims(weight_CN[place], 1 - axis))
            for place in range(count)
        )
        return sum(parts, jnp.zeros_like(x))

    # Whole numbers are as fast for two tokens; a float matrix has a faster product with one alone.
    counts = [count for count in FEWER[1 - axis :] if count < num_tokens]
    ways = [lambda *_: jnp.zeros_like(x), *(partial(show, count) for count in counts), show_all]
    said = []
    for index, expert in enumerate(experts):
        size = plan.size_E[index]
        way = (size > 0) + jnp.sum(size > jnp.array(counts, int), dtype=jnp.int32)
        said.append(lax.switch(way, [partial(way, index, expert) for way in ways]))
    return sum(said[1:], said[0])


def _in_pieces(x, plan: SortPlan, experts, activation) -> Float[Array, "..."]:
    """Let each expert work through its own tokens, in products of a few sizes; the last holds the rest."""
    axis = experts[0].token_axis
    num_rows = x.shape[axis]
    share = max(LEAST_PIECE, min(LARGEST_PIECE, num_rows // len(experts)))
    sizes = sorted({min(num_rows, 8 * math.ceil(part * share / 8)) for part in PARTS})
    most = sizes[-1]
    end_E = jnp.cumsum(plan.size_E)
    y = jnp.zeros_like(x)

    for index, expert in enumerate(experts):
        end = end_E[index]

        def look_at(size, skipped, seen, expert=expert):
            # Only the piece goes through a branch: all tokens would be copied by each.
            offset = jnp.minimum(skipped, most - size)
            said = expert(take(seen, offset, size, axis), activation)
            return lax.dynamic_update_slice_in_dim(jnp.zeros_like(seen), said, offset, axis)

        def do_piece(turn, y, first=end - plan.size_E[index], end=end, look_at=look_at):
            begin = first + turn * most
            # Near the end of all rows a piece starts earlier, to be as long as the others.
            start = jnp.minimum(begin, num_rows - most)
            kind = jnp.sum(end - begin > jnp.array(sizes[:-1]))
            said = lax.switch(
                kind, [partial(look_at, size) for size in sizes], begin - start, take(x, start, most, axis)
            )
            row_P = start + jnp.arange(most)
            mine = jnp.expand_dims((row_P >= begin) & (row_P < end), 1 - axis)
            said = jnp.where(mine, said, take(y, start, most, axis))
            return lax.dynamic_update_slice_in_dim(y, said, start, axis)

        y = lax.fori_loop(0, -(-plan.size_E[index] // most), do_piece, y)
    return y


def _seated(x_GTD, plan, experts, activation, dispatch) -> Float[Array, "G T D"]:
    """Let each expert transform its seats, unless all are empty."""
    x_EGCD = fill_seats(x_GTD, plan, dispatch)
    rows = experts[0].token_axis == 0
    x = rearrange(x_EGCD, "E G C D -> E (G C) D" if rows else "E G C D -> E D (G C)")
    taken_E = jnp.ones(len(experts), bool)
    if isinstance(plan, SlotPlan):
        taken_E = jnp.any(plan.token_GEC < x_GTD.shape[1], axis=(0, 2))
    y = []
    for index, expert in enumerate(experts):
        transform = partial(expert, activation=activation)
        y.append(lax.cond(taken_E[index], transform, jnp.zeros_like, x[index]))
    y = jnp.stack(y)
    y_EGCD = rearrange(y, "E (G C) D -> E G C D" if rows else "E D (G C) -> E G C D", G=len(x_GTD))
    return empty_seats(y_EGCD, plan, dispatch)
