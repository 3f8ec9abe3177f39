"""Move tokens to their seats and back by index: the default, whose cost does not grow with E.

Taking tokens into seats and summing seats back into tokens are each other's transpose, so that both gradients
are gathers too, where XLA would derive scatter-adds. A plan without an inverse (expert choice, K = 0) sums
seats by a scatter-add, in the result and in dispatch's gradient.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from switchmoe.dispatching.slots import SlotPlan
from switchmoe.dispatching.varying import vary_alike
from switchmoe.shapes import Array, Float, Int


@jax.custom_vjp
def take_tokens(
    x_ND: Float[Array, "N D"], token_R: Int[Array, " R"], seat_NK: Int[Array, "N K"]
) -> Float[Array, "R D"]:
    """Copy each seat's token into the seat; a seat whose token is out of range stays 0.

    `seat_NK` is the inverse of `token_R` (out of range where a choice has no seat), for the gradient alone.
    With K = 0 there is none, and the gradient adds seats up by token.
    """
    return x_ND.at[token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def sum_seats(
    y_RD: Float[Array, "R D"],
    weight_R: Float[Array, " R"],
    seat_NK: Int[Array, "N K"],
    token_R: Int[Array, " R"],
) -> Float[Array, "N D"]:
    """Add up, for each token, what stands in its seats times the seats' weights; without a seat exactly 0.

    An empty seat is never read, so a NaN from an expert that nobody chose stays with that expert.
    """
    weight_R = weight_R.astype(y_RD.dtype)
    if seat_NK.shape[1] == 0:
        return _add_by_token(y_RD * weight_R[:, None], token_R, seat_NK.shape[0])
    weight_NK = weight_R.at[seat_NK].get(mode="fill", fill_value=0)
    y_NKD = y_RD.at[seat_NK].get(mode="fill", fill_value=0)
    return jnp.sum(y_NKD * weight_NK[..., None], axis=1)


def _add_by_token(
    y_RD: Float[Array, "R D"], token_R: Int[Array, " R"], num_tokens: int
) -> Float[Array, "N D"]:
    return jnp.zeros((num_tokens, y_RD.shape[1]), y_RD.dtype).at[token_R].add(y_RD, mode="drop")


def _no_gradient(index: Array) -> np.ndarray:
    return np.zeros(index.shape, jax.dtypes.float0)


def _take_forward(x_ND, token_R, seat_NK):
    return take_tokens(x_ND, token_R, seat_NK), (token_R, seat_NK)


def _take_backward(indices, g_RD):
    token_R, seat_NK = indices
    if seat_NK.shape[1] == 0:
        g_ND = _add_by_token(g_RD, token_R, seat_NK.shape[0])
    else:
        g_ND = g_RD.at[seat_NK].get(mode="fill", fill_value=0).sum(axis=1)
    return g_ND, _no_gradient(token_R), _no_gradient(seat_NK)


def _sum_forward(y_RD, weight_R, seat_NK, token_R):
    return sum_seats(y_RD, weight_R, seat_NK, token_R), (y_RD, weight_R, seat_NK, token_R)


def _sum_backward(saved, g_ND):
    y_RD, weight_R, seat_NK, token_R = saved
    g_RD = g_ND.at[token_R].get(mode="fill", fill_value=0)
    # One product of rows: left to XLA, the weights' gradient takes three masked copies of [R, D].
    slope_R = jnp.einsum("RD,RD->R", g_RD, y_RD, preferred_element_type=jnp.float32)
    # An empty seat may hold a NaN, and 0 * NaN is no gradient.
    slope_R = jnp.where(token_R < g_ND.shape[0], slope_R, 0).astype(weight_R.dtype)
    g_RD = g_RD * weight_R.astype(g_RD.dtype)[:, None]
    return g_RD, slope_R, _no_gradient(seat_NK), _no_gradient(token_R)


take_tokens.defvjp(_take_forward, _take_backward)
sum_seats.defvjp(_sum_forward, _sum_backward)


def flat_indices(plan: SlotPlan) -> tuple[Int[Array, "E G C"], Int[Array, "N K"]]:
    """Number tokens and seats across groups: each seat's token, experts outermost, and each token's seats.

    Experts come first so that an expert's seats of all groups are one block of rows for its matmul. The plan
    has one group dimension.
    """
    num_groups, num_experts, seats = plan.token_GEC.shape
    num_tokens = plan.slot_GTK.shape[1]
    group_G = jnp.arange(num_groups)[:, None, None]
    token_GEC = jnp.where(
        plan.token_GEC < num_tokens, plan.token_GEC + group_G * num_tokens, num_groups * num_tokens
    )
    expert_GTK, seat_GTK = jnp.divmod(plan.slot_GTK, seats)
    slot_GTK = jnp.where(
        plan.kept_GTK,
        (expert_GTK * num_groups + group_G) * seats + seat_GTK,
        num_experts * num_groups * seats,
    )
    return rearrange(token_GEC, "G E C -> E G C"), rearrange(slot_GTK, "G T K -> (G T) K")


def dispatch_by_expert(x_GTD: Float[Array, "G T D"], plan: SlotPlan) -> Float[Array, "E G C D"]:
    """Copy each token into its seats, experts outermost."""
    token_EGC, slot_NK = flat_indices(plan)
    x_RD = take_tokens(rearrange(x_GTD, "G T D -> (G T) D"), token_EGC.reshape(-1), slot_NK)
    return x_RD.reshape(*token_EGC.shape, x_GTD.shape[-1])


def combine_by_expert(y_EGCD: Float[Array, "E G C D"], plan: SlotPlan) -> Float[Array, "G T D"]:
    """Sum each token's seats, experts outermost, each seat times its weight."""
    token_EGC, slot_NK = flat_indices(plan)
    weight_R = rearrange(plan.weight_GEC, "G E C -> (E G C)")
    y_RD = rearrange(y_EGCD, "E G C D -> (E G C) D")
    y_ND = sum_seats(*vary_alike(y_RD, weight_R, slot_NK, token_EGC.reshape(-1)))
    return y_ND.reshape(*plan.slot_GTK.shape[:2], y_EGCD.shape[-1])


def _one_group_axis(plan: SlotPlan) -> tuple[SlotPlan, tuple[int, ...]]:
    """Give a plan with any leading group dimensions exactly one, and say which it had."""
    groups = plan.token_GEC.shape[:-2]
    return jax.tree.map(lambda a: a.reshape(math.prod(groups), *a.shape[len(groups) :]), plan), groups


def dispatch(x_TD: Float[Array, "*G T D"], plan: SlotPlan) -> Float[Array, "*G E C D"]:
    """Copy each token into the seats the plan gives it; an empty seat holds 0."""
    plan, groups = _one_group_axis(plan)
    x_EGCD = dispatch_by_expert(x_TD.reshape(-1, *x_TD.shape[-2:]), plan)
    x_GECD = rearrange(x_EGCD, "E G C D -> G E C D")
    return x_GECD.reshape(*groups, *x_GECD.shape[1:])


def combine(y_ECD: Float[Array, "*G E C D"], plan: SlotPlan) -> Float[Array, "*G T D"]:
    """Add up each token's seats times their weights; a token that was dropped gets exactly 0."""
    plan, groups = _one_group_axis(plan)
    y_GECD = y_ECD.reshape(-1, *y_ECD.shape[-3:])
    y_GTD = combine_by_expert(rearrange(y_GECD, "G E C D -> E G C D"), plan)
    return y_GTD.reshape(*groups, *y_GTD.shape[1:])
