"""The readable grouped matmul: one expert after the other, every row at each.

The reference, and never the fastest: each expert multiplies all R rows and keeps its own, so the work is E
times what is needed.
"""

import jax.numpy as jnp
from jax import lax

from switchmoe.dispatching.grouped.base import Backend, runs_everywhere
from switchmoe.dispatching.varying import vary_alike
from switchmoe.shapes import Array, Bool, Float, Int


def _rows_of(expert: Int[Array, ""], num_rows: int, size_E: Int[Array, " E"]) -> Bool[Array, "R 1"]:
    end = jnp.cumsum(size_E)[expert]
    row_R = jnp.arange(num_rows)
    return ((row_R >= end - size_E[expert]) & (row_R < end))[:, None]


def product(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"] | Float[Array, "E O I"],
    size_E: Int[Array, " E"],
    transpose_w: bool = False,
) -> Float[Array, "R O"]:
    """Multiply each row by its expert's matrix."""
    num_out = w_EIO.shape[1] if transpose_w else w_EIO.shape[2]

    def add_expert(expert, y_RO):
        w_IO = w_EIO[expert].T if transpose_w else w_EIO[expert]
        y_expert_RO = jnp.dot(x_RI, w_IO, preferred_element_type=jnp.float32)
        return jnp.where(_rows_of(expert, x_RI.shape[0], size_E), y_expert_RO, y_RO)

    y_RO, *_ = vary_alike(jnp.zeros((x_RI.shape[0], num_out), jnp.float32), x_RI, w_EIO, size_E)
    return lax.fori_loop(0, w_EIO.shape[0], add_expert, y_RO).astype(x_RI.dtype)


def weight_gradient(
    x_RI: Float[Array, "R I"], g_RO: Float[Array, "R O"], size_E: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """Sum the outer products of each expert's rows."""

    def one_expert(expert):
        mine_R1 = _rows_of(expert, x_RI.shape[0], size_E)
        # Both are masked: 0 * NaN of another's row would be NaN.
        x_own_RI, g_own_RO = jnp.where(mine_R1, x_RI, 0), jnp.where(mine_R1, g_RO, 0)
        return jnp.dot(x_own_RI.T, g_own_RO, preferred_element_type=jnp.float32).astype(x_RI.dtype)

    return lax.map(one_expert, jnp.arange(size_E.shape[0]))


LOOP = Backend(product, weight_gradient, runs_everywhere)
