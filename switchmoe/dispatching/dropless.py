"""Sort tokens by expert, so that every choice is served: nothing is dropped and no seat is empty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from switchmoe.dispatching.gather import sum_seats, take_tokens
from switchmoe.dispatching.varying import vary_alike
from switchmoe.routing.base import Routing
from switchmoe.shapes import Array, Float, Int


class SortPlan(NamedTuple):
    """All choices of all groups in one row after the other, expert by expert, and the way back.

    There are as many rows as choices, R = G * T * K. Choices of masked tokens and choices that are not used
    come last, past the last expert's rows, and name token G * T.

    Attributes:
      token_R: the token in each row, counted over groups: group * T + token.
      choice_R: which choice that is, counted over tokens too: (group * T + token) * K + choice.
      weight_R: the weight of that row's output in its token's result; 0 past the last expert's rows.
      row_NK: the row of each choice of each token; R where the choice is not used or the token is padding.
      size_E: rows of each expert.
    """

    token_R: Int[Array, " R"]
    choice_R: Int[Array, " R"]
    weight_R: Float[Array, " R"]
    row_NK: Int[Array, "N K"]
    size_E: Int[Array, " E"]


@jax.jit  # or each small step compiles by itself
def sort_choices(routing: Routing) -> SortPlan:
    """Put each token's choices into the rows of their experts, in the order of the tokens.

    `routing` has one group dimension. Within an expert tokens keep their order, and groups theirs.

    Source: MegaBlocks, section 3, https://arxiv.org/abs/2211.15841.
    """
    num_experts = routing.probs_GTE.shape[-1]
    expert_GTK = jnp.where(routing.mask_GT[..., None], routing.expert_GTK, num_experts)
    flat = "G T K -> (G T) K"
    return sort_by_expert(rearrange(expert_GTK, flat), rearrange(routing.weight_GTK, flat), num_experts)


def sort_by_expert(
    expert_NK: Int[Array, "N K"], weight_NK: Float[Array, "N K"], num_experts: int
) -> SortPlan:
    """Do the same for tokens that know no groups; a choice of expert `num_experts` is not used."""
    k = expert_NK.shape[1]
    expert_R = expert_NK.reshape(-1)
    choice_R = jnp.argsort(expert_R, stable=True)
    sorted_R = expert_R[choice_R]
    num_rows = expert_R.size
    used_R = sorted_R < num_experts
    row_R = jnp.zeros_like(choice_R).at[choice_R].set(jnp.arange(num_rows), unique_indices=True)
    row_R = jnp.where(expert_R < num_experts, row_R, num_rows)
    return SortPlan(
        token_R=jnp.where(used_R, choice_R // k, num_rows // k).astype(jnp.int32),
        choice_R=choice_R.astype(jnp.int32),
        weight_R=jnp.where(used_R, weight_NK.reshape(-1)[choice_R], 0.0),
        row_NK=rearrange(row_R, "(N K) -> N K", K=k).astype(jnp.int32),
        size_E=jnp.sum(expert_R[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32),
    )


def dispatch_sorted(x_GTD: Float[Array, "G T D"], plan: SortPlan) -> Float[Array, "R D"]:
    """Copy each token into the rows of its choices; a row past the last expert's holds 0."""
    return take_tokens(rearrange(x_GTD, "G T D -> (G T) D"), plan.token_R, plan.row_NK)


def combine_sorted(y_RD: Float[Array, "R D"], plan: SortPlan, num_groups: int) -> Float[Array, "G T D"]:
    """Add up each token's rows times their weights; a token without any gets exactly 0."""
    y_ND = sum_seats(*vary_alike(y_RD, plan.weight_R, plan.row_NK, plan.token_R))
    return rearrange(y_ND, "(G T) D -> G T D", G=num_groups)
