"""The grouped matmul for a handful of rows, as when one token a row is generated: no loop and no sorting.

With fewer rows than experts each row is given its expert's matrix; with more, every expert multiplies all
rows and each row keeps its own. On an accelerator either takes as long as reading the weights, where a walk
over experts waits for each of its steps.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from switchmoe.dispatching.grouped.base import Backend, is_used
from switchmoe.shapes import Array, Float, Int

# Beyond this the work, which grows with experts times rows, is no longer hidden behind reading the weights.
MOST_ROWS = 64


def _owners(num_rows: int, size_E: Int[Array, " E"]) -> Int[Array, " R"]:
    """Say whose each row is; the last expert's where it is nobody's."""
    owner_R = jnp.sum(jnp.arange(num_rows)[:, None] >= jnp.cumsum(size_E), axis=1)
    return jnp.minimum(owner_R, size_E.size - 1)


def _in_parts(do_part: Callable[..., Array], *by_row: Array) -> Array:
    """Do as many rows at a time as it is meant for, what comes of each part in a first dimension."""
    num_rows = by_row[0].shape[0]
    if num_rows <= MOST_ROWS:
        return do_part(*by_row)[None]
    parts = -(-num_rows // MOST_ROWS)

    def cut(a: Array) -> Array:
        filled = jnp.pad(a, ((0, parts * MOST_ROWS - num_rows), *[(0, 0)] * (a.ndim - 1)))
        return filled.reshape(parts, MOST_ROWS, *a.shape[1:])

    return lax.map(lambda part: do_part(*part), tuple(map(cut, by_row)))


def product(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"] | Float[Array, "E O I"],
    size_E: Int[Array, " E"],
    transpose_w: bool = False,
) -> Float[Array, "R O"]:
    """Multiply each row by its expert's matrix, or by all and keep one."""
    num_rows, last = x_RI.shape[0], "oi" if transpose_w else "io"

    def multiply(x_RI, owner_R, used_R):
        if len(x_RI) < w_EIO.shape[0]:
            y_RO = jnp.einsum(f"ri,r{last}->ro", x_RI, w_EIO[owner_R], preferred_element_type=jnp.float32)
        else:
            y_ERO = jnp.einsum(f"ri,e{last}->ero", x_RI, w_EIO, preferred_element_type=jnp.float32)
            y_RO = y_ERO[owner_R, jnp.arange(len(x_RI))]
        return jnp.where(used_R[:, None], y_RO, 0).astype(x_RI.dtype)

    y_PRO = _in_parts(multiply, x_RI, _owners(num_rows, size_E), is_used(num_rows, size_E)[:, 0])
    return y_PRO.reshape(-1, y_PRO.shape[-1])[:num_rows]


def weight_gradient(
    x_RI: Float[Array, "R I"], g_RO: Float[Array, "R O"], size_E: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """Sum each expert's outer products, all rows at each."""
    num_rows = x_RI.shape[0]
    mine_RE = _owners(num_rows, size_E)[:, None] == jnp.arange(size_E.size)
    mine_RE = mine_RE & is_used(num_rows, size_E)

    def sum_products(x_RI, g_RO, mine_RE):
        # Both are masked: 0 * NaN of another's row would be NaN.
        x_ERI, g_ERO = (jnp.where(mine_RE.T[..., None], a, 0) for a in (x_RI, g_RO))
        return jnp.einsum("eri,ero->eio", x_ERI, g_ERO, preferred_element_type=jnp.float32)

    return _in_parts(sum_products, x_RI, g_RO, mine_RE).sum(axis=0).astype(x_RI.dtype)


def available(platform: str, *arrays: Array) -> str:
    """Say that it runs everywhere, and is meant for few rows."""
    del platform
    if arrays and arrays[0].shape[0] > MOST_ROWS:
        return f"it is for {MOST_ROWS} rows at most, and here are {arrays[0].shape[0]}; choose another."
    return ""


FEW = Backend(product, weight_gradient, available)
