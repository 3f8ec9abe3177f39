"""The expert FFNs laid out for generating on a CPU: a few tokens at a time, every expert's matrices apart.

Reading weights is all that a token costs there. XLA:CPU multiplies by a whole array in place, but copies a
part of one first, so a stack of experts is read, written and read again; and with the outputs as a matrix's
rows, many tokens read it as fast as one. So each matrix is an array of its own, transposed, and only experts
with tokens are run.
"""

import math
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from switchmoe.config import Activation, Dispatch
from switchmoe.dispatching.dropless import SortPlan, combine_sorted, dispatch_sorted
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.execution import Plan, empty_seats, fill_seats
from switchmoe.experts import ACTIVATIONS, ExpertParams
from switchmoe.quantized import (
    MOST_BLOCKS,
    Halves,
    multiply_by_integers,
    multiply_halves,
    packed_in,
    split_in_halves,
)
from switchmoe.shapes import Array, Float, Num

take = lax.dynamic_slice_in_dim
# With so many tokens every expert takes all of them, its own and others: its weights are read once anyway.
FEW = 16
# Rows of an expert that are multiplied at once where there are more, as parts of an even share (which counts
# as between these): what is not filled is wasted, and each size is compiled for each expert.
PARTS, LEAST_PIECE, LARGEST_PIECE = (0.5, 1.0, 1.25, 2.0), 16, 256


class Matrix(NamedTuple):
    """One matrix of one expert.

    Attributes:
      weight: transposed, [outputs, inputs], where it is float; the values of `quantize_weight` where it has
        scales.
      scale_QO: its scales, or None.
    """

    weight: Num[Array, "rows columns"]
    scale_QO: Float[Array, "Q O"] | None = None

    @property
    def outputs(self) -> int:
        """How many numbers it makes of a row."""
        return self.weight.shape[0 if self.scale_QO is None else 1]

    @property
    def inputs(self) -> int:
        """How many numbers a token has."""
        rows, columns = self.weight.shape
        return columns if self.scale_QO is None else rows * packed_in(self.weight)

    def times(self, x: Float[Array, "..."] | Halves) -> Float[Array, "..."]:
        """Multiply tokens by the matrix, in their type: as columns, or as rows where it has scales."""
        if isinstance(x, Halves):
            assert self.scale_QO is not None
            return multiply_halves(x, self.weight, self.scale_QO)
        if self.scale_QO is not None:
            return multiply_by_integers(x, self.weight, self.scale_QO)
        weight_OI = self.weight.astype(x.dtype)
        return jnp.matmul(weight_OI, x, preferred_element_type=jnp.float32).astype(x.dtype)


class ServedExpert(NamedTuple):
    """The matrices of one expert.

    Attributes:
      w_in: into the hidden features; with a gate, into the gate's behind them, so that one product makes
        both.
      w_out: out of them.
    """

    w_in: Matrix
    w_out: Matrix

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.w_in.outputs != self.w_out.inputs

    @property
    def token_axis(self) -> int:
        """The axis that tokens are on: 1 where they are columns, 0 where they are rows."""
        return 1 if self.w_in.scale_QO is None else 0

    def __call__(self, x: Float[Array, "..."] | Halves, activation: Activation) -> Float[Array, "..."]:
        """Transform tokens: act(x W_in) W_out, or (act(x W_gate) * (x W_in)) W_out."""
        act, hidden = ACTIVATIONS[activation], self.w_in.times(x)
        if self.gated:
            hidden, gate = jnp.split(hidden, 2, axis=1 - self.token_axis)
            return self.w_out.times(hidden * act(gate))
        return self.w_out.times(act(hidden))


class ServedExperts(NamedTuple):
    """All experts of a layer, one by one; stands in the place of `ExpertParams` where a model generates."""

    experts: tuple[ServedExpert, ...]
    trainable = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many experts there are, and their D and F."""
        w_out = self.experts[0].w_out
        return len(self.experts), w_out.outputs, w_out.inputs

    @property
    def gated(self) -> bool:
        """Whether they have a gate."""
        return self.experts[0].gated


def serve_experts(params: ExpertParams) -> ServedExperts:
    """Take the experts of a layer out of their stack; what they say to a token stays the same.

    The weights are copied: `params` may be dropped then.
    """

    matrices = params.matrices

    def join(expert: int, *names: str) -> Matrix:
        """Join matrices side by side."""
        scales = [scale[expert] for _, scale in (matrices[name] for name in names) if scale is not None]
        weight = jnp.concatenate([matrices[name][0][expert] for name in names], axis=-1)
        return Matrix(weight, jnp.concatenate(scales, axis=-1)) if scales else Matrix(weight.T)

    into = ("w_in", "w_gate") if params.gated else ("w_in",)
    experts = range(len(params.w_in_EDF))
    return ServedExperts(tuple(ServedExpert(join(e, *into), join(e, "w_out")) for e in experts))


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


def _few(x, plan: SortPlan, experts, activation) -> Float[Array, "..."]:
    """Show each expert that somebody chose its own tokens, or all of them, and weigh what it says."""
    axis = experts[0].token_axis
    num_tokens, num_rows = x.shape[axis], plan.token_R.size
    owner_R = jnp.searchsorted(jnp.cumsum(plan.size_E), jnp.arange(num_rows), side="right")
    # Rows past the last expert's name a token, or an expert, that does not exist.
    weight_EN = jnp.zeros((len(experts), num_tokens), x.dtype)
    weight_EN = weight_EN.at[owner_R, plan.token_R].add(plan.weight_R.astype(x.dtype), mode="drop")
    first_E = jnp.cumsum(plan.size_E) - plan.size_E
    scale = experts[0].w_in.scale_QO
    # Written in halves once for all experts.
    given = x if scale is None or scale.shape[0] > MOST_BLOCKS else split_in_halves(x)

    def weigh(said, weight):
        return jnp.where(weight != 0, weight * said, 0).astype(x.dtype)

    def show_all(index, expert):
        return weigh(expert(given, activation), jnp.expand_dims(weight_EN[index], 1 - axis))

    def show(count, index, expert):
        row_C = first_E[index] + jnp.arange(count)
        token_C = jnp.where(row_C < first_E[index] + plan.size_E[index], plan.token_R[row_C], num_tokens)
        said = expert(jnp.take(x, token_C, axis, mode="clip"), activation)
        weight_CN = jnp.where(token_C[:, None] == jnp.arange(num_tokens), weight_EN[index], 0)
        parts = (
            weigh(take(said, place, 1, axis), jnp.expand_dims(weight_CN[place], 1 - axis))
            for place in range(count)
        )
        return sum(parts, jnp.zeros_like(x))

    # Whole numbers are as fast for two tokens; a float matrix has a faster product with one alone.
    counts = [count for count in (1, 2, 4) if count > axis ^ 1 and count < num_tokens]
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
