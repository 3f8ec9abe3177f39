"""Rematerialisation by name: what a block keeps for the backward pass, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from switchmoe.config import check_choice

RematPolicy = Literal["none", "full", "dots", "all_dots"]

_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all_dots": jax.checkpoint_policies.dots_saveable,
}


def rematerialize(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Return `function` with the rule of `policy` for its backward pass; values and gradients stay the same.

    - "none": keep every intermediate value; the fastest, and the most memory.
    - "full": keep only the block's input and compute the block a second time, for about a third more FLOPs.
    - "dots": keep the products with the plain weight matrices (attention projections, dense FFN, router) and
      compute the rest again, among it attention scores and the experts, whose products are batched over
      experts.
    - "all_dots": keep the batched products too.

    The function is meant to be a body of `jax.lax.scan`, where the compiler's common-subexpression
    elimination cannot undo the rematerialisation, so the guard against that is left out.

    Raises:
        ValueError: if there is no such policy, with the nearest name.
    """
    check_choice("remat", policy, get_args(RematPolicy))
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=_SAVED[policy], prevent_cse=False)
