"""Count the rows of the tiles that a grouped matmul's kernels visit: their work, whatever they declare."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from switchmoe.dispatching.grouped import megablox, mosaic_gpu
from switchmoe.shapes import Array, Int

Kernel = Literal["product", "weight_gradient"]


def draw_sizes(count: int, num_rows: int, num_experts: int) -> dict[str, np.ndarray]:
    """Draw numbers of rows an expert: from a fair router, from an unfair one, and with ends put anywhere."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(num_experts), size=count)
    ends = np.sort(rng.integers(0, num_rows + 1, size=(count, num_experts - 1)))
    return {
        "fair": rng.multinomial(num_rows, np.full(num_experts, 1 / num_experts), size=count),
        "unfair": np.stack([rng.multinomial(num_rows, share) for share in shares]),
        "ends anywhere": np.diff(ends, prepend=0, append=num_rows),
    }


def rows_visited_by_megablox(size_E: Int[Array, " E"], num_rows: int, kernel: Kernel) -> Int[Array, ""]:
    """Ask the library for the tiles that its kernels walk over, and return their rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    rows = megablox.tile_rows(num_rows)
    _, tiles = make_group_metadata(
        group_sizes=size_E.astype(jnp.int32),
        m=-(-num_rows // rows) * rows,
        tm=rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=size_E.shape[0],
        visit_empty_groups=kernel == "weight_gradient",
    )
    return tiles * rows


def rows_visited_by_mosaic_gpu(size_E: Int[Array, " E"], num_rows: int, kernel: Kernel) -> Int[Array, ""]:
    """Return the rows of the tiles that the Hopper kernels walk over, worked out from their grids.

    The product's grid is fixed. The weight gradient goes over the blocks of rows that an expert touches.
    """
    if kernel == "product":
        rows = mosaic_gpu.tile_rows(num_rows, size_E.shape[0])
        return jnp.int32((-(-num_rows // rows) + size_E.shape[0] - 1) * rows)
    block = mosaic_gpu.BLOCK
    end_E = jnp.cumsum(size_E)
    blocks_E = -(-end_E // block) - (end_E - size_E) // block
    return block * jnp.sum(jnp.where(size_E > 0, blocks_E, 0))
