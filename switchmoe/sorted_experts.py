"""The expert FFNs on rows sorted by expert, as dropless dispatch leaves them: no seats, no empty ones."""

import jax
import jax.numpy as jnp

from switchmoe.config import Activation
from switchmoe.dispatching.dropless import SortPlan
from switchmoe.dispatching.grouped_matmul import grouped_matmul
from switchmoe.experts import ACTIVATIONS, ExpertParams
from switchmoe.shapes import Array, Float, Int, ScalarKey


def apply_experts_sorted(
    params: ExpertParams,
    x_RD: Float[Array, "R D"],
    plan: SortPlan,
    *,
    activation: Activation = "relu",
    implementation: str | None = None,
    dropout: float = 0.0,
    key: ScalarKey | None = None,
    group_G: Int[Array, " G"] | None = None,
) -> Float[Array, "R D"]:
    """Send each row's token through its expert: act(x W_in) W_out, or (act(x W_gate) * (x W_in)) W_out.

    What `apply_experts` does for seats. Rows past the last expert's give 0. `implementation` is the grouped
    matmul's backend. With a `key`, expert dropout zeroes hidden features with probability `dropout` and
    scales the rest by 1 / (1 - dropout); its noise follows a choice's token and its group's index in the
    whole batch, `group_G` (one group, 0, unless given), not the row or the device. `apply_experts` draws its
    noise by seats, so the two differ.

    Source: Switch Transformers, section 2.4 (expert dropout); MegaBlocks, https://arxiv.org/abs/2211.15841.
    """
    dtype = x_RD.dtype
    act = ACTIVATIONS[activation]

    def product(rows, w_EIO):
        return grouped_matmul(rows, w_EIO.astype(dtype), plan.size_E, implementation=implementation)

    h_RF = product(x_RD, params.w_in_EDF)
    h_RF = act(h_RF) if params.w_gate_EDF is None else h_RF * act(product(x_RD, params.w_gate_EDF))
    if dropout > 0 and key is not None:
        group_G = jnp.arange(1) if group_G is None else group_G
        keep_RF = _draw_kept(key, 1 - dropout, group_G, plan, h_RF.shape)
        h_RF = jnp.where(keep_RF, h_RF / (1 - dropout), 0)
    return product(h_RF, params.w_out_EFD)


def _draw_kept(key: ScalarKey, rate: float, group_G: Array, plan: SortPlan, shape: tuple[int, int]) -> Array:
    """Draw which hidden features of each row stay, choice by choice, then in the order of the rows."""
    per_group = (shape[0] // group_G.size, shape[1])

    def draw(group):
        return jax.random.bernoulli(jax.random.fold_in(key, group), rate, per_group)

    return jax.vmap(draw)(group_G).reshape(shape)[plan.choice_R]
