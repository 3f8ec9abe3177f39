"""The grouped matmul as a walk: one expert after the other, each over its own rows only.

The work does not grow with the number of experts. A product of XLA has a fixed size, so there is one for each
of a few numbers of rows, close together around an even share, and an expert takes the smallest that holds its
rows; an expert with more rows than the largest cuts them into equal pieces. Pieces of one size are one loop,
since a conditional in a single loop would copy whole results at each step. Nothing is padded or copied but
what a step works on, and an expert's matrix is read once a piece.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from switchmoe.dispatching.grouped.base import Backend, runs_everywhere
from switchmoe.dispatching.varying import vary_alike
from switchmoe.shapes import Array, Bool, Float, Int

# Rows of a piece, as multiples of an even share: what an expert does not fill is wasted; each is compiled.
STEPS = (0.25, 0.5, 0.75, 1.0, 1.0625, 1.125, 1.25, 1.5, 2.0)
MULTIPLE = 8
# Beyond this a larger piece is no faster, and an expert that has more is cut at no cost.
MOST_SHARE = 512


class Piece(NamedTuple):
    """Some rows of one expert.

    Attributes:
      expert: whose rows they are.
      start: the first of the rows to look at. Near the end of all rows that is earlier than the first of the
        piece, so that a fixed number of rows can be looked at.
      mine_P1: True at those that belong to the piece, as a column.
    """

    expert: Int[Array, ""]
    start: Int[Array, ""]
    mine_P1: Bool[Array, "P 1"]

    def of(self, x_RI: Float[Array, "R I"]) -> Float[Array, "P I"]:
        """Take these rows out of all rows."""
        return lax.dynamic_slice_in_dim(x_RI, self.start, self.mine_P1.shape[0])


def piece_sizes(num_rows: int, num_experts: int) -> list[int]:
    """List the numbers of rows that a piece may have, for any load of the experts."""
    share = min(num_rows / num_experts, MOST_SHARE)
    return sorted({min(num_rows, MULTIPLE * math.ceil(step * share / MULTIPLE)) for step in STEPS})


def cut_into_pieces(size_E: Int[Array, " E"], num_rows: int, kinds: list[int]) -> tuple[Array, Array]:
    """Cut every expert's rows into as few equal pieces as fit, and sort the pieces by kind.

    Returns one line a piece [expert, first row, row after the last], and for each kind where its pieces end.
    """
    num_experts, most = size_E.shape[0], kinds[-1]
    count_E = -(-size_E // most)
    each_E = -(-size_E // jnp.maximum(count_E, 1))
    end_E = jnp.cumsum(size_E)
    # No more than these, whatever the sizes; those past the last expert's are empty and come first.
    piece_P = jnp.arange(num_rows // most + num_experts)
    last_piece_E = jnp.cumsum(count_E)
    owner_P = jnp.sum(piece_P[:, None] >= last_piece_E, axis=1)
    expert_P = jnp.minimum(owner_P, num_experts - 1)
    nth_P = piece_P - (last_piece_E - count_E)[expert_P]
    first_P = (end_E - size_E)[expert_P] + nth_P * each_E[expert_P]
    end_P = jnp.minimum(first_P + each_E[expert_P], end_E[expert_P])
    fits_P = jnp.sum((end_P - first_P)[:, None] > jnp.array([0, *kinds[:-1]]), axis=1)
    kind_P = jnp.where(owner_P < num_experts, fits_P, 0)
    table_P3 = jnp.stack([expert_P, first_P, end_P], axis=1)[jnp.argsort(kind_P)]
    return table_P3, jnp.sum(kind_P[:, None] <= jnp.arange(len(kinds) + 1), axis=0)


def walk(size_E: Int[Array, " E"], num_rows: int, do_piece: Callable, carry: Array) -> Array:
    """Call `do_piece(piece, carry) -> carry` for pieces that hold each expert's rows, each row once."""
    if num_rows == 0:
        return carry
    kinds = piece_sizes(num_rows, size_E.shape[0])
    table_P3, end_of_kind = cut_into_pieces(size_E, num_rows, kinds)
    for kind, rows in enumerate(kinds):

        def take_turn(turn, carry, rows=rows):
            expert, first, end = table_P3[turn]
            start = jnp.minimum(first, num_rows - rows)
            row_P = start + jnp.arange(rows)
            return do_piece(Piece(expert, start, ((row_P >= first) & (row_P < end))[:, None]), carry)

        carry = lax.fori_loop(end_of_kind[kind], end_of_kind[kind + 1], take_turn, carry)
    return carry


def product(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"] | Float[Array, "E O I"],
    size_E: Int[Array, " E"],
    transpose_w: bool = False,
) -> Float[Array, "R O"]:
    """Multiply each expert's rows by its matrix, a piece at a time."""
    num_rows, num_out = x_RI.shape[0], w_EIO.shape[1 if transpose_w else 2]
    contract = (((1,), (1 if transpose_w else 0,)), ((), ()))

    def do_piece(piece, y_RO):
        w_IO = w_EIO[piece.expert]
        y_PO = lax.dot_general(piece.of(x_RI), w_IO, contract, preferred_element_type=jnp.float32)
        y_PO = jnp.where(piece.mine_P1, y_PO.astype(y_RO.dtype), piece.of(y_RO))
        return lax.dynamic_update_slice_in_dim(y_RO, y_PO, piece.start, axis=0)

    y_RO, *_ = vary_alike(jnp.zeros((num_rows, num_out), x_RI.dtype), x_RI, w_EIO, size_E)
    return walk(size_E, num_rows, do_piece, y_RO)


def weight_gradient(
    x_RI: Float[Array, "R I"], g_RO: Float[Array, "R O"], size_E: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """Sum the outer products of each expert's rows, a piece at a time."""

    def do_piece(piece, dw_EIO):
        # Both are masked: 0 * NaN of another's row would be NaN.
        x_PI = jnp.where(piece.mine_P1, piece.of(x_RI), 0)
        g_PO = jnp.where(piece.mine_P1, piece.of(g_RO), 0)
        dw_IO = lax.dot_general(x_PI, g_PO, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dw_EIO.at[piece.expert].add(dw_IO)

    dw_EIO = jnp.zeros((size_E.shape[0], x_RI.shape[1], g_RO.shape[1]), jnp.float32)
    dw_EIO, *_ = vary_alike(dw_EIO, x_RI, g_RO, size_E)
    return walk(size_E, x_RI.shape[0], do_piece, dw_EIO).astype(x_RI.dtype)


BLOCKS = Backend(product, weight_gradient, runs_everywhere)
