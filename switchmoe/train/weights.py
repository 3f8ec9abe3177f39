"""What a weight's name says about its shape: which axes are the matrix, which only stack matrices."""

import re
from typing import Any

import jax

_SUFFIX = re.compile(r"_([A-Z]+|1)$")


def dimensions(path: tuple[Any, ...]) -> str:
    """Read the dimensions of a weight from its name: "DF" for `w_in_DF`, by the legend of `switchmoe.shapes`.

    Raises:
      ValueError: the name has no suffix of capitals (or 1).
    """
    name = str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1])))
    found = _SUFFIX.search(name)
    if not found:
        raise ValueError(
            f"the weight {jax.tree_util.keystr(path)} has no dimensions in its name, so the optimizer can't "
            "tell its layer and expert axes; name it like w_in_EDF."
        )
    return found.group(1)


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
