"""The programs of the grouped matmul's benchmark: a backend's three products, and the dense ones beside."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.dispatching.grouped import BACKENDS, Backend
from switchmoe.dispatching.grouped.mosaic_gpu import Tiles

# Tiles whose sums fit into a warpgroup's registers, as the compiler says; see `Tiles` for the numbers.
PRODUCT_SWEEP = (
    *(Tiles(128, 128, 64, stages, strips) for stages in (4, 6) for strips in (1, 4, 8, 16)),
    *(Tiles(128, 128, 128, stages, 8) for stages in (2, 3)),
    *(Tiles(128, 64, 128, 4, strips) for strips in (4, 8)),
    *(Tiles(192, 128, 64, 4, strips) for strips in (4, 8)),
    *(Tiles(64, wide, 64, 4, 4) for wide in (128, 256)),
)
GRADIENT_SWEEP = (
    *(Tiles(128, 128, 64, stages, strips) for stages in (4, 6) for strips in (1, 4, 8)),
    *(Tiles(128, 128, 128, stages, 4) for stages in (2, 3)),
    *(Tiles(64, wide, 64, 4, 4) for wide in (64, 128, 256)),
)


class Program(NamedTuple):
    """One product by one backend.

    Attributes:
      kind: "product", rows times weights; "back", the rows' gradient; "to weights", the weights' gradient.
      backend: its name; "dense" is the product in which all rows meet one matrix.
      tiles: how a kernel cuts its work, where that was asked for.
      fn: called with x_RI, w_EIO, g_RO and size_E.
    """

    kind: str
    backend: str
    tiles: str
    fn: Callable[..., Any]


def three_products(name: str, backend: Backend) -> list[Program]:
    """Make a backend's three products."""
    return [
        Program("product", name, "", _product(backend.product)),
        Program("back", name, "", _back(backend.product)),
        Program("to weights", name, "", _to_weights(backend.weight_gradient)),
    ]


def dense_products() -> list[Program]:
    """Make the products of the same shapes in which every row meets the first expert's matrix."""

    def dot(x_RI, w_IO, contract: tuple[int, int]):
        dimensions = ((contract[:1], contract[1:]), ((), ()))
        y_RO = jax.lax.dot_general(x_RI, w_IO, dimensions, preferred_element_type=jnp.float32)
        return y_RO.astype(x_RI.dtype)

    return [
        Program("product", "dense", "", lambda x, w, g, size: dot(x, w[0], (1, 0))),
        Program("back", "dense", "", lambda x, w, g, size: dot(g, w[0], (1, 1))),
        Program("to weights", "dense", "", lambda x, w, g, size: dot(x, g, (0, 0))),
    ]


def swept_products(d_in: int, d_out: int) -> list[Program]:
    """Make the Hopper kernels' products with each of the tiles that fit these widths."""
    kernels, found = BACKENDS["mosaic_gpu"], []
    for tiles in PRODUCT_SWEEP:
        name, product = "x".join(map(str, tiles)), partial(kernels.product, tiles=tiles)
        if d_out % (tiles.wide * tiles.strips) == 0 == d_in % tiles.deep:
            found.append(Program("product", "mosaic_gpu", name, _product(product)))
        if d_in % (tiles.wide * tiles.strips) == 0 == d_out % tiles.deep:
            found.append(Program("back", "mosaic_gpu", name, _back(product)))
    for tiles in GRADIENT_SWEEP:
        name, gradient = "x".join(map(str, tiles)), partial(kernels.weight_gradient, tiles=tiles)
        if d_out % (tiles.wide * tiles.strips) == 0 == d_in % tiles.tall:
            found.append(Program("to weights", "mosaic_gpu", name, _to_weights(gradient)))
    return found


def _product(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, g, size: run(x, w, size)


def _back(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, g, size: run(g, w, size, transpose_w=True)


def _to_weights(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, g, size: run(x, g, size)
