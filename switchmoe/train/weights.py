"""What a weight's name says about its shape: which axes are the matrix, which only stack matrices."""

from typing import Any

import jax

from switchmoe.parallel import Layout, dimensions, stored_as


def stacked_axes(path: tuple[Any, ...], weight: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Count the leading axes that stack independent matrices: super-blocks, layers in them, and experts.

    A scanned model stacks its layers in front of the axes that the name gives; experts are an E in front of
    the rest.
    """
    own = dimensions(path)
    return weight.ndim - len(own) + own.startswith("E")


def matrix_mask(params: Any) -> Any:
    """Mark the weights that decay: those with two or more axes of their own, so not the scales of norms."""
    return jax.tree.map_with_path(lambda path, weight: weight.ndim - stacked_axes(path, weight) >= 2, params)


def split_like_weights(layout: Layout | None, gradients: Any) -> Any:
    """Keep gradients where their weights are, so that a sum over devices is cut into parts as it is made."""
    if layout is None:
        return gradients
    return jax.tree.map_with_path(lambda path, a: layout.place(a, stored_as(layout, path, a.ndim)), gradients)
