"""Low-rank adapters of experts: small matrices that are trained in the place of large ones, and merged."""

from typing import Any

import jax
import jax.numpy as jnp

from switchmoe.parallel import Layout, stored_as
from switchmoe.shapes import Array, Float, ScalarKey, named_key

Params = dict[str, Any]

# The experts' matrices, and the dimensions that their adapters go down from and up to.
_MATRICES = {"w_in_EDF": "DF", "w_gate_EDF": "DF", "w_out_EFD": "FD"}
_NAMES = {
    name: (name.replace(f"_E{dims}", f"_down_E{dims[0]}J"), name.replace(f"_E{dims}", f"_up_EJ{dims[1]}"))
    for name, dims in _MATRICES.items()
}


def is_adapter(name: str) -> bool:
    """Say whether a weight of this name is a part of an adapter, such as `w_in_down_EDJ` or `w_in_up_EJF`."""
    return any(name in pair for pair in _NAMES.values())


def draw_adapters(params: Params, *, rank: int, key: ScalarKey) -> Params:
    """Give every matrix of every routed expert an adapter of its own, which changes nothing yet.

    Beside `w_in_EDF` stand then `w_in_down_EDJ`, normal with deviation 1 / sqrt(D), and `w_in_up_EJF`, zero,
    both float32; the same for `w_out_EFD` and `w_gate_EDF`. Layers in front of these dimensions stay in
    front. Returns a new tree with the same weights in it.

    Raises:
      ValueError: the rank is above that of a matrix, or there is no expert.

    Source: LoRA, section 4.1, https://arxiv.org/abs/2106.09685.
    """
    adapted, found = _adapt(params, rank, key)
    if not found:
        raise ValueError("adapters are for the experts of sparse layers, and these weights have none.")
    return adapted


def merge_adapters(params: Params, *, alpha: float, layout: Layout | None = None) -> Params:
    """Add each adapter to its matrix, W + (alpha / rank) down up, and leave the adapters out.

    The sum is taken in float32 and kept in the type of W. With a `layout` it lies where W does. Weights
    without adapters stay as they are.
    """
    return _merge(params, alpha, layout, ())


def _adapt(params: Params, rank: int, key: ScalarKey) -> tuple[Params, bool]:
    adapted, found = {}, False
    for name, value in params.items():
        adapted[name] = value
        if isinstance(value, dict):
            adapted[name], inside = _adapt(value, rank, named_key(key, name))
            found |= inside
        elif name in _NAMES:
            found = True
            *stack, inputs, outputs = value.shape
            if rank > min(inputs, outputs):
                raise ValueError(
                    f"the adapters' rank is {rank}, but that of {name} is {min(inputs, outputs)}; "
                    "make it less."
                )
            down, up = _NAMES[name]
            normal = jax.random.normal(named_key(key, down), (*stack, inputs, rank), jnp.float32)
            adapted[down] = normal / inputs**0.5
            adapted[up] = jnp.zeros((*stack, rank, outputs), jnp.float32)
    return adapted, found


def _merge(params: Params, alpha: float, layout: Layout | None, path: tuple[Any, ...]) -> Params:
    merged = {}
    for name, value in params.items():
        here = (*path, jax.tree_util.DictKey(name))
        if isinstance(value, dict):
            merged[name] = _merge(value, alpha, layout, here)
        elif name in _NAMES and _NAMES[name][0] in params:
            down, up = (params[part] for part in _NAMES[name])
            whole = _add(jnp.asarray(value), jnp.asarray(down), jnp.asarray(up), alpha / down.shape[-1])
            merged[name] = (
                whole if layout is None else layout.place(whole, stored_as(layout, here, whole.ndim))
            )
        elif not is_adapter(name):
            merged[name] = value
    return merged


def _add(
    w: Float[Array, "*stack I O"],
    down: Float[Array, "*stack I J"],
    up: Float[Array, "*stack J O"],
    scale: float,
) -> Float[Array, "*stack I O"]:
    return (w.astype(jnp.float32) + scale * (down @ up)).astype(w.dtype)
