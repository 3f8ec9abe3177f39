"""Rematerialisation by name: what a block keeps for the backward pass, and what it computes again."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from switchmoe.config import check_choice
from switchmoe.parallel import DISPATCHED, GATHERED, RETURNED

RematPolicy = Literal["none", "full", "dots", "all_dots", "exchanged"]

_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all_dots": jax.checkpoint_policies.dots_saveable,
    "exchanged": jax.checkpoint_policies.save_only_these_names(DISPATCHED, RETURNED),
}


def rematerialize(
    function: Callable[..., Any], policy: str, *, gathered_over: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Return `function` with the rule of `policy` for its backward pass; values and gradients stay the same.

    - "none": keep every intermediate value; the fastest, and the most memory.
    - "full": keep only the block's input and compute the block a second time, for about a third more FLOPs.
    - "dots": keep the products with the plain weight matrices (attention projections, dense FFN, router) and
      compute the rest again, among it attention scores and the experts, whose products are batched over
      experts.
    - "all_dots": keep the batched products too.
    - "exchanged": keep the block's input and what travelled to the experts and back on a mesh, so that it
      does not travel a second time; compute the rest again, also on one device, where nothing travels.

    Weights that are put together inside the block from parts along the mesh axes `gathered_over` are never
    kept, whatever the policy, or every device would soon have all of them.

    The function is meant to be a body of `jax.lax.scan`, where the compiler's common-subexpression
    elimination cannot undo the rematerialisation, so the guard against that is left out.

    Raises:
        ValueError: if there is no such policy, with the nearest name.
    """
    check_choice("remat", policy, get_args(RematPolicy))
    if policy == "none":
        if not gathered_over:
            return function
        keep = functools.partial(_is_no_whole_weight, gathered_over)
        return jax.checkpoint(function, policy=keep, prevent_cse=False)
    return jax.checkpoint(function, policy=_SAVED[policy], prevent_cse=False)


def _is_no_whole_weight(over: tuple[str, ...], primitive: Any, *_: Any, **params: Any) -> bool:
    """Keep what a block computes, but not the weights it puts together, by their name or by how they came."""
    if primitive.name == "name":
        return params["name"] != GATHERED
    if primitive.name == "all_gather":
        names = params["axis_name"]
        return tuple(names if isinstance(names, tuple) else (names,)) != over
    # A weight outside shard_map; an activation that is placed is what it was before.
    return primitive.name != "sharding_constraint"
