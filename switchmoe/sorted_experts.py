"""The expert FFNs on rows sorted by expert, as dropless dispatch leaves them: no seats, no empty ones."""

import jax
import jax.numpy as jnp

from switchmoe.config import Activation
from switchmoe.dispatching.dropless import SortPlan
from switchmoe.dispatching.grouped_matmul import grouped_matmul
from switchmoe.experts import ACTIVATIONS, ExpertParams, draw_kept
from switchmoe.quantized import dequantize_weight, unpack
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
    origin_R2: Int[Array, "R 2"] | None = None,
    part_of_F: tuple[Int[Array, ""] | int, int] = (0, 1),
) -> Float[Array, "R D"]:
    """Send each row's token through its expert: act(x W_in) W_out, or (act(x W_gate) * (x W_in)) W_out.

    What `apply_experts` does for seats. Rows past the last expert's give 0. `implementation` is the grouped
    matmul's backend. With a `key`, expert dropout zeroes hidden features with probability `dropout` and
    scales the rest by 1 / (1 - dropout); its noise follows a choice's number in its group, counted over
    tokens, and its group's index in the whole batch, `group_G` (one group, 0, unless given), not the row or
    the device. Where rows come from other devices, `origin_R2` gives both numbers, group first, row by row;
    where the hidden features are split, `part_of_F` says which of how many equal parts these are.
    `apply_experts` draws its noise by seats, so the two differ.

    Source: Switch Transformers, section 2.4 (expert dropout); MegaBlocks, https://arxiv.org/abs/2211.15841.
    """
    dtype = x_RD.dtype
    act = ACTIVATIONS[activation]

    matrices = params.matrices

    def product(rows, name):
        w_EIO, scale_EQO = matrices[name]
        if scale_EQO is not None and scale_EQO.shape[1] > 1:
            w_EIO, scale_EQO = dequantize_weight(w_EIO, scale_EQO, dtype), None
        y_RO = grouped_matmul(rows, unpack(w_EIO, dtype), plan.size_E, implementation=implementation)
        if scale_EQO is None:
            return y_RO
        return (y_RO * scale_EQO[_owners(plan), 0]).astype(dtype)

    h_RF = product(x_RD, "w_in")
    h_RF = h_RF * act(product(x_RD, "w_gate")) if "w_gate" in matrices else act(h_RF)
    if dropout > 0 and key is not None:
        if origin_R2 is None:
            origin_R2 = origins(plan, jnp.arange(1) if group_G is None else group_G)

        def draw(origin_2):
            row_key = jax.random.fold_in(jax.random.fold_in(key, origin_2[0]), origin_2[1])
            return draw_kept(row_key, 1 - dropout, h_RF.shape[1:], part_of_F)

        h_RF = jnp.where(jax.vmap(draw)(origin_R2), h_RF / (1 - dropout), 0)
    return product(h_RF, "w_out")


def _owners(plan: SortPlan) -> Int[Array, " R"]:
    """Say whose a row is; the last expert's where it is nobody's, and 0 anyway."""
    owner_R = jnp.searchsorted(jnp.cumsum(plan.size_E), jnp.arange(plan.token_R.size), side="right")
    return jnp.minimum(owner_R, plan.size_E.size - 1)


def origins(plan: SortPlan, group_G: Int[Array, " G"]) -> Int[Array, "R 2"]:
    """Say for each row of a plan over these groups which group it is of, and which choice in it."""
    group_R, choice_R = jnp.divmod(plan.choice_R, plan.choice_R.size // group_G.size)
    return jnp.stack([group_G[group_R], choice_R], axis=1).astype(jnp.int32)
