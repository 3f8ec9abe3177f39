"""How each weight of a model is stored on a mesh and put together where it is used, by its name."""

import functools
import re
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from switchmoe.parallel.layout import Layout
from switchmoe.shapes import Array

# A weight in one piece, by the name that `jax.checkpoint` policies know it under.
GATHERED = "gathered_weight"
_SUFFIX = re.compile(r"_([A-Z]+|1)$")


def dimensions(path: tuple[Any, ...]) -> str:
    """Read the dimensions of a weight from its name: "DF" for `w_in_DF`, by the legend of `switchmoe.shapes`.

    Raises:
      ValueError: the name has no suffix of capitals (or 1).
    """
    found = _SUFFIX.search(_name(path))
    if not found:
        raise ValueError(
            f"the weight {jax.tree_util.keystr(path)} has no dimensions in its name, so neither its layers "
            "and experts nor its place on a mesh can be told; name it like w_in_EDF."
        )
    return found.group(1)


def stored_as(layout: Layout, path: tuple[Any, ...], ndim: int) -> PartitionSpec:
    """Say how a model's weight of `ndim` dimensions is stored; those before the ones in its name are layers.

    Experts are split over the expert axis, but a shared one is not, matrices as the rules say; what a router
    has, the scales of norms, and balance biases are whole.
    """
    dims = dimensions(path)
    stacked = ndim - len(dims)
    if _is_expert(path):
        shared = _name(path).startswith("shared_")
        return layout.weight_spec(dims[shared:], stacked + shared)
    if len(dims) < 2 or "E" in dims:
        return PartitionSpec()
    return layout.weight_spec(dims, stacked)


def gather_weights(layout: Layout, weights: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Put the matrices of a model's layer together from their parts, in the type they are used in.

    Experts stay as they are, since their layer gathers them by itself, and so does what is whole anyway.
    Gradients are summed and cut into parts on the way back.
    """
    if not layout.used(layout.rules.model):
        return weights

    def gather(path: tuple[Any, ...], weight: Array) -> Array:
        dims = dimensions(path)
        if _is_expert(path) or len(dims) < 2 or "E" in dims or weight.ndim != len(dims):
            return weight
        return gather_weight(layout, weight.astype(dtype), dims)

    return jax.tree.map_with_path(gather, weights)


def gather_weight(layout: Layout, weight: Array, dims: str) -> Array:
    """Put one weight together where it is used; its gradient is summed and cut into parts on the way back."""
    if not layout.used(layout.rules.model):
        return weight
    return checkpoint_name(_gather(layout, dims, weight), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(layout: Layout, dims: str, weight: Array) -> Array:
    return layout.gather(weight, dims)


def _gather_forward(layout, dims, weight):
    return layout.gather(weight, dims), None


def _gather_backward(layout, dims, _, gradient):
    # Cut into parts as it is summed. But for an embedding, whose gradient adds up rows by their token, the
    # partitioner would then send tokens around, so that one is summed in one piece and cut.
    whole = layout.gather(gradient, dims) if "V" in dims else gradient
    return (layout.place(whole, layout.weight_spec(dims)),)


_gather.defvjp(_gather_forward, _gather_backward)


def _name(path: tuple[Any, ...]) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return names[-2] if names[-1] == "value" else names[-1]  # a Flax variable's array is its "value"


def _is_expert(path: tuple[Any, ...]) -> bool:
    return _name(path).removeprefix("shared_") in ("w_in_EDF", "w_out_EFD", "w_gate_EDF")
