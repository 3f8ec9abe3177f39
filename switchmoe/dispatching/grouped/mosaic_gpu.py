"""The grouped matmul on NVIDIA's Hopper GPUs: the Mosaic kernels that come with jax, in bfloat16.

The product runs over tiles of rows, a tile once for each expert that has rows in it, and reads transposed
weights as they lie. The weight gradient runs over each expert's blocks of rows. Neither makes anything of
size [E, R, D], as `lax.ragged_dot` does there. In float32, and on other cards, there is "blocks".

On a mesh of several devices the kernels must be called inside shard_map.
"""

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.dispatching.grouped.base import Backend, zero_unused_rows
from switchmoe.dispatching.varying import out_of_sight
from switchmoe.shapes import Array, Float, Int

# What the tensor cores take from shared memory at once: 128 bytes of bfloat16.
BLOCK = 64
_MAX_EXPERTS = 256
_HOPPER = "9.0"


class Tiles(NamedTuple):
    """How a kernel cuts its work; the defaults of both kernels are `product_tiles` and `gradient_tiles`.

    Attributes:
      tall: rows of a tile of the result: tokens in the product, x's features in the weight gradient.
      wide: its columns.
      deep: how much of what is summed over is fetched at once, a multiple of BLOCK that divides it.
      stages: how many such pieces are under way at once.
      strips: neighbouring strips of columns that are done before the next rows are fetched; a divisor of all.
    """

    tall: int
    wide: int
    deep: int = BLOCK
    stages: int = 4
    strips: int = 8


@out_of_sight
def product(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"] | Float[Array, "E O I"],
    size_E: Int[Array, " E"],
    transpose_w: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "R O"]:
    """Multiply each row by its expert's matrix, a tile of rows at a time.

    Raises:
      ValueError: one sentence, if the kernel does not take that dtype or these widths.

    Source: the kernel `ragged_dot_mgpu` of jax, after MegaBlocks, https://arxiv.org/abs/2211.15841.
    """
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    _raise_problem(x_RI, w_EIO, size_E)
    num_rows, num_out = x_RI.shape[0], w_EIO.shape[1 if transpose_w else 2]
    if num_rows == 0:
        return jnp.zeros((0, num_out), x_RI.dtype)
    tiles = tiles or product_tiles(num_rows, size_E.shape[0], num_out)
    y_RO = ragged_dot(
        x_RI,
        w_EIO,
        group_sizes=size_E.astype(jnp.int32),
        block_m=tiles.tall,
        block_n=tiles.wide,
        block_k=tiles.deep,
        max_concurrent_steps=tiles.stages,
        grid_block_n=tiles.strips,
        transpose_rhs=transpose_w,
    )
    # Rows past the last group are never stored: what stands there is whatever the memory held.
    return zero_unused_rows(y_RO, size_E)


@out_of_sight
def weight_gradient(
    x_RI: Float[Array, "R I"],
    g_RO: Float[Array, "R O"],
    size_E: Int[Array, " E"],
    tiles: Tiles | None = None,
) -> Float[Array, "E I O"]:
    """Sum the outer products of each expert's rows; the kernel is jax's `transposed_ragged_dot_mgpu`.

    A block of rows that two experts share is read by both, and each multiplies the other's rows by 0. So a
    used row that is not finite reaches the weights of its expert and of the neighbours in its block of 64,
    and rows past the last group have to be finite: `clean` makes them 0.

    Raises:
      ValueError: one sentence, if the kernel does not take that dtype or these widths.
    """
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    _raise_problem(x_RI, g_RO, size_E)
    (num_rows, num_in), num_out = x_RI.shape, g_RO.shape[1]
    if num_rows == 0:
        return jnp.zeros((size_E.shape[0], num_in, num_out), x_RI.dtype)
    tiles = tiles or gradient_tiles(num_in, num_out)
    if num_rows % tiles.deep:
        x_RI, g_RO = (jnp.pad(rows, ((0, -num_rows % tiles.deep), (0, 0))) for rows in (x_RI, g_RO))
    return transposed_ragged_dot(
        x_RI,
        g_RO,
        group_sizes=size_E.astype(jnp.int32),
        block_m=tiles.tall,
        block_n=tiles.wide,
        block_k=tiles.deep,
        max_concurrent_steps=tiles.stages,
        grid_block_n=tiles.strips,
    )


def product_tiles(num_rows: int, num_experts: int, num_out: int) -> Tiles:
    """Return how the product cuts its work."""
    wide = _largest_divisor(num_out, (128, 64))
    strips = _largest_divisor(num_out // wide, (8, 4, 2, 1))
    return Tiles(tile_rows(num_rows, num_experts), wide, strips=strips)


def gradient_tiles(num_in: int, num_out: int) -> Tiles:
    """Return how the weight gradient cuts its work; an expert's strips in their order were the fastest."""
    wide = _largest_divisor(num_out, (128, 64))
    return Tiles(_largest_divisor(num_in, (128, 64)), wide, stages=6, strips=1)


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Return how many rows a tile of the product has: 128 where at most an eighth is lost so, else 64.

    The kernel always runs num_rows / tile + num_experts - 1 tiles, however the rows are spread.
    """
    return 128 if (num_experts - 1) * 128 * 8 <= num_rows else 64


def _largest_divisor(size: int, candidates: tuple[int, ...]) -> int:
    return next(candidate for candidate in candidates if size % candidate == 0)


def _problem(x_RI: Array, other: Array, size_E: Array) -> str:
    """Say what about these arrays the kernels can't take; nothing if they can."""
    if x_RI.dtype != jnp.bfloat16:
        return f"its kernels multiply bfloat16 and x is {x_RI.dtype}; cast, or take implementation=None."
    widths = (x_RI.shape[-1], *other.shape[1:])
    if any(width % BLOCK for width in widths):
        return f"its kernels need widths in multiples of {BLOCK}, not {widths}; take implementation=None."
    if size_E.shape[0] > _MAX_EXPERTS:
        # The kernel looks for its expert with one comparison after the other, written out.
        return (
            f"its kernels are for up to {_MAX_EXPERTS} experts, not {len(size_E)}; take implementation=None."
        )
    return ""


def _raise_problem(*arrays: Array) -> None:
    if problem := _problem(*arrays):
        raise ValueError(f"matmul='mosaic_gpu' can't run here: {problem}")


def available(platform: str, *arrays: Array) -> str:
    """Say why the kernels do not run on that platform, or for these x, w (or g) and size; else nothing."""
    if platform != "cuda":
        return f"its kernels are for NVIDIA GPUs, not {platform}; take implementation=None or 'blocks'."
    if importlib.util.find_spec("absl") is None:
        return "jax's module with these kernels imports absl; install absl-py."
    # jax's kernel asks the first device for its number of cores, so without a GPU it can't even be traced.
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != _HOPPER or not hasattr(device, "core_count"):
        return (
            f"its kernels are for compute capability {_HOPPER} (H100, H200), and the first device, "
            f"{device.device_kind}, has {capability or 'none'}; take implementation=None or 'blocks'."
        )
    return _problem(*arrays) if arrays else ""


def clean(x_RI: Float[Array, "R I"], w_EIO: Array, size_E: Int[Array, " E"]) -> Float[Array, "R I"]:
    """Put 0 into the rows past the last group."""
    del w_EIO
    return zero_unused_rows(x_RI, size_E)


MOSAIC_GPU = Backend(product, weight_gradient, available, clean)
