"""What `jax.shard_map` wants to know of an array: over which axes of the mesh it differs."""

import jax
from jax import lax

from switchmoe.shapes import Array


def vary_alike(*arrays: Array) -> list[Array]:
    """Let all arrays vary over the same mesh axes inside shard_map, which checks it; elsewhere do nothing.

    What a loop carries, and what goes into a function with a gradient rule of its own, has to: there jax
    does not see to it by itself.
    """
    varying = [varying_axes(array) for array in arrays]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]


def varying_axes(array: Array) -> frozenset[str]:
    """Name the mesh axes over which an array varies inside a shard_map that checks them."""
    kind = jax.typeof(array)
    # jax 0.10 keeps it one level deeper than the versions before it.
    return frozenset(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)
