"""Move tokens to their seats and back by a product with one-hot tables: the readable reference.

It costs capacity_factor * T / d_ff of the experts' own work, so it is an oracle and not the default.

Source: Mesh TensorFlow's Switch, https://arxiv.org/abs/2101.03961, figure 16; GShard,
https://arxiv.org/abs/2006.16668, algorithm 1.
"""

import jax
import jax.numpy as jnp

from switchmoe.dispatching.slots import SlotPlan
from switchmoe.shapes import Array, Bool, Float


def dispatch_table(plan: SlotPlan) -> Float[Array, "*G T E C"]:
    """Put a 1 where a token sits in a seat."""
    num_tokens = plan.slot_GTK.shape[-2]
    # An empty seat names token T, which one_hot turns into zeros.
    return jax.nn.one_hot(plan.token_GEC, num_tokens, axis=-3, dtype=jnp.float32)


def is_taken(plan: SlotPlan) -> Bool[Array, "*G E C"]:
    """Tell the seats that hold a token from the empty ones."""
    return plan.token_GEC < plan.slot_GTK.shape[-2]


def dispatch_einsum(x_TD: Float[Array, "*G T D"], plan: SlotPlan) -> Float[Array, "*G E C D"]:
    """Copy each token into the seats the plan gives it; an empty seat holds 0."""
    x_ECD = jnp.einsum("...TEC,...TD->...ECD", dispatch_table(plan).astype(x_TD.dtype), x_TD)
    # An empty seat is 0 already; this stops its gradient, a NaN if the expert holds one, from reaching x.
    return jnp.where(is_taken(plan)[..., None], x_ECD, 0)


def combine_einsum(y_ECD: Float[Array, "*G E C D"], plan: SlotPlan) -> Float[Array, "*G T D"]:
    """Add up each token's seats times their weights; a token that was dropped gets exactly 0."""
    # Without this, 0 * NaN of an unused expert reaches every token.
    y_ECD = jnp.where(is_taken(plan)[..., None], y_ECD, 0)
    table_TEC = dispatch_table(plan) * plan.weight_GEC[..., None, :, :]
    return jnp.einsum("...TEC,...ECD->...TD", table_TEC.astype(y_ECD.dtype), y_ECD)
