"""What a backend of the grouped matmul is, and the small helpers that backends share."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from switchmoe.shapes import Array, Bool, Float, Int


def as_they_are(x_RI: Array, *_: Array) -> Array:
    """Leave rows as they are."""
    return x_RI


class Backend(NamedTuple):
    """Two products over rows sorted by expert, and whether they can run.

    Rows come sorted: the first size_E[0] belong to expert 0, the next size_E[1] to expert 1, and so on. Sizes
    are any numbers from 0 up, known at run time only, whose sum is at most R. Rows past that sum belong to
    nobody and may hold anything, NaN included. Both must be right for any number of rows, in float32 and
    bfloat16, accumulating in float32; their inputs share one dtype, and so does the result. They have to
    work under jit, scan and remat; `grouped_matmul` owns the gradient, so they are never differentiated.

    Attributes:
      product: `(x_RI, w_EIO, size_E, transpose_w=False) -> y_RO`, each row times its expert's matrix; with
        `transpose_w` the weights are w_EOI, and each row meets the transpose. Rows past the last group are
        exactly 0, and an expert without rows reaches nothing, whatever its weights hold.
      weight_gradient: `(x_RI, g_RO, size_E) -> w_EIO`, for each expert the sum over its rows of the outer
        product of x and g, which went through `clean`; exactly 0 for an expert without rows, whatever stood
        in rows past the last group.
      available: `(platform, *arrays) -> str`, for a platform as jax names it ("cpu", "tpu", "cuda"): empty if
        the backend runs there, and with these x, w (or g) and size if they are given; else one sentence that
        says why not and what to change.
      clean: `(x_RI, w_EIO, size_E) -> x_RI`, the rows, or those of the gradient that comes back, as
        `weight_gradient` wants them; nothing unless it says so. It belongs where the rows are made, since
        a pass over them that follows another is free there, while a copy for one product alone is not.
    """

    product: Callable[..., Float[Array, "R O"]]
    weight_gradient: Callable[..., Float[Array, "E I O"]]
    available: Callable[..., str]
    clean: Callable[..., Float[Array, "R I"]] = as_they_are


def is_used(num_rows: int, size_E: Int[Array, " E"]) -> Bool[Array, "R 1"]:
    """Say for each row whether it belongs to an expert, as a column to mask rows with."""
    return (jnp.arange(num_rows) < size_E.sum())[:, None]


def zero_unused_rows(x_RI: Float[Array, "R I"], size_E: Int[Array, " E"]) -> Float[Array, "R I"]:
    """Put 0 into the rows past the last group."""
    return jnp.where(is_used(x_RI.shape[0], size_E), x_RI, 0)


def zero_idle_experts(w_EIO: Float[Array, "E I O"], size_E: Int[Array, " E"]) -> Float[Array, "E I O"]:
    """Put 0 into the matrices of experts that have no row."""
    return jnp.where((size_E > 0)[:, None, None], w_EIO, 0)


def runs_everywhere(platform: str, *arrays: Array) -> str:
    """Say that a backend made of plain XLA operations runs on every platform, with any arrays."""
    del platform, arrays
    return ""
