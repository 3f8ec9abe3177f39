"""The grouped matmul as XLA has it: `lax.ragged_dot`.

Its cost is right for the product on TPU. On CPU, in its weight gradient on TPU, and on the NVIDIA GPUs of
2026, XLA lowers it to a dense masked product over all experts, E times the work: choose it by name where it
was measured to be fast.
"""

import jax.numpy as jnp
from jax import lax

from switchmoe.dispatching.grouped.base import (
    Backend,
    runs_everywhere,
    zero_idle_experts,
    zero_unused_rows,
)
from switchmoe.shapes import Array, Float, Int

_GROUPED_CONTRACTION = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def product(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"] | Float[Array, "E O I"],
    size_E: Int[Array, " E"],
    transpose_w: bool = False,
) -> Float[Array, "R O"]:
    """Multiply each row by its expert's matrix in one `lax.ragged_dot`."""
    if transpose_w:
        w_EIO = jnp.swapaxes(w_EIO, 1, 2)
    # XLA's masked product multiplies every row by every expert, and 0 * NaN is NaN.
    x_RI, w_EIO = zero_unused_rows(x_RI, size_E), zero_idle_experts(w_EIO, size_E)
    y_RO = lax.ragged_dot(x_RI, w_EIO, size_E.astype(jnp.int32), preferred_element_type=jnp.float32)
    return zero_unused_rows(y_RO, size_E).astype(x_RI.dtype)


def weight_gradient(
    x_RI: Float[Array, "R I"], g_RO: Float[Array, "R O"], size_E: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """Sum each expert's outer products in one `lax.ragged_dot_general` that contracts the rows."""
    w_EIO = lax.ragged_dot_general(
        zero_unused_rows(x_RI, size_E),
        zero_unused_rows(g_RO, size_E),
        size_E.astype(jnp.int32),
        _GROUPED_CONTRACTION,
        preferred_element_type=jnp.float32,
    )
    return zero_idle_experts(w_EIO, size_E).astype(x_RI.dtype)


RAGGED_DOT = Backend(product, weight_gradient, runs_everywhere)
