"""The grouped matmul on TPU: megablox, the Pallas kernels that come with jax.

The kernels walk over tiles of rows and visit a tile once for each expert that has rows in it. Tiles of 128
rows are what a v5e's matrix unit takes at once and keep the waste small: E unaligned experts add at most
E - 1 tiles to the R / 128 of all rows (16,384 rows and 64 experts: at most 1.49 times the work). What is not
finite in one expert's rows or weights reaches no other expert.

On a mesh of several devices the kernels must be called inside shard_map, where each device has rows of its
own.
"""

import jax.numpy as jnp

from switchmoe.dispatching.grouped.base import Backend, zero_unused_rows
from switchmoe.dispatching.varying import out_of_sight
from switchmoe.shapes import Array, Float, Int

TILE_ROWS = 128
_LANES = 128
# What a kernel may keep in a TPU core's fast memory: XLA gives it 16 MiB, and the rest is the compiler's own.
_PRODUCT_BYTES = 13 * 2**20
_MAX_INNER = 2048
# A tile of a weight gradient is this square: 4 MiB of sums in float32, and two of the result.
_GRADIENT_TILE = 1024


@out_of_sight
def product(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"] | Float[Array, "E O I"],
    size_E: Int[Array, " E"],
    transpose_w: bool = False,
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """Multiply each row by its expert's matrix, a tile of rows at a time.

    Source: the megablox kernel `gmm` of jax, after MegaBlocks, https://arxiv.org/abs/2211.15841.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    (num_rows, num_in), num_out = x_RI.shape, w_EIO.shape[1 if transpose_w else 2]
    if num_rows == 0:
        return jnp.zeros((0, num_out), x_RI.dtype)
    rows = tile_rows(num_rows)
    y_RO = gmm(
        _pad_rows(x_RI, rows),
        w_EIO,
        size_E.astype(jnp.int32),
        preferred_element_type=x_RI.dtype,
        tiling=(rows, *product_tile(num_in, num_out, x_RI.dtype.itemsize)),
        transpose_rhs=transpose_w,
        interpret=interpret,
    )
    # Tiles past the last group are never visited: what stands there is whatever the memory held.
    return zero_unused_rows(y_RO[:num_rows], size_E)


@out_of_sight
def weight_gradient(
    x_RI: Float[Array, "R I"],
    g_RO: Float[Array, "R O"],
    size_E: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "E I O"]:
    """Sum the outer products of each expert's rows, a tile of rows at a time: megablox's kernel `tgmm`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (num_rows, num_in), num_out = x_RI.shape, g_RO.shape[1]
    if num_rows == 0:
        return jnp.zeros((size_E.shape[0], num_in, num_out), x_RI.dtype)
    rows = tile_rows(num_rows)
    # The kernel masks both sides row by row, and visits an expert without rows once, to write its zeros.
    return tgmm(
        _pad_rows(x_RI, rows).T,
        _pad_rows(g_RO, rows),
        size_E.astype(jnp.int32),
        preferred_element_type=x_RI.dtype,
        tiling=(rows, equal_tile(num_in, _GRADIENT_TILE), equal_tile(num_out, _GRADIENT_TILE)),
        interpret=interpret,
    )


def tile_rows(num_rows: int) -> int:
    """Return how many rows a tile has: 128, or if there are fewer, all of them in whole registers of 16."""
    return min(TILE_ROWS, -(-num_rows // 16) * 16)


def equal_tile(size: int, limit: int) -> int:
    """Cut a dimension into the fewest equal tiles of at most `limit`: 2,080 by 1,024 gives three of 768."""
    if size <= limit:
        return size
    num_tiles = -(-size // limit)
    return -(-size // num_tiles // _LANES) * _LANES


def product_tile(num_in: int, num_out: int, itemsize: int) -> tuple[int, int]:
    """Return the tile of a weight matrix, as (in, out), that a product keeps in fast memory.

    With all of `in` in one tile, consecutive row tiles of an expert find its weights there already, so that
    each weight is read once. Only where that leaves no room for a strip of outputs is `in` cut too.
    """
    for inner in (num_in, equal_tile(num_in, _MAX_INNER)):
        outer = _outputs_that_fit(inner, itemsize)
        if outer >= min(num_out, _LANES):
            break
    return inner, equal_tile(num_out, outer)


def _outputs_that_fit(inner: int, itemsize: int) -> int:
    """Solve the kernel's memory for the width of its strip of outputs, in whole registers.

    Rows [rows, in], weights [in, out] and result [rows, out] are each there twice, one copy being filled
    while the other is used; the sums [rows, out] are in float32, once.
    """
    free = _PRODUCT_BYTES - 2 * itemsize * TILE_ROWS * inner
    per_output = 2 * itemsize * (inner + TILE_ROWS) + 4 * TILE_ROWS
    return free // per_output // _LANES * _LANES


def _pad_rows(x_RI: Float[Array, "R I"], rows: int) -> Float[Array, "padded I"]:
    return jnp.pad(x_RI, ((0, -x_RI.shape[0] % rows), (0, 0)))


def available(platform: str, *arrays: Array) -> str:
    """Say why the kernels do not run on that platform; else nothing."""
    del arrays
    if platform != "tpu":
        return f"megablox's kernels are for TPU and this is {platform}; take implementation=None or 'blocks'."
    return ""


MEGABLOX = Backend(product, weight_gradient, available)
