"""The expert FFNs: each seat's token through its expert's two (or three, when gated) matrices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from switchmoe.config import Activation
from switchmoe.shapes import Array, Float, Int, ScalarKey, named_key

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


class ExpertParams(NamedTuple):
    """The experts' weights, without biases.

    Attributes:
      w_in_EDF: into the hidden features.
      w_out_EFD: out of them.
      w_gate_EDF: the gate of a gated FFN, else None.
    """

    w_in_EDF: Float[Array, "E D F"]
    w_out_EFD: Float[Array, "E F D"]
    w_gate_EDF: Float[Array, "E D F"] | None = None


def init_experts(
    key: ScalarKey,
    *,
    num_experts: int,
    d_model: int,
    d_ff: int,
    gated: bool = False,
    init_scale: float = 0.1,
    dtype: DTypeLike = jnp.float32,
) -> ExpertParams:
    """Draw every expert's weights apart: truncated normal with deviation sqrt(init_scale / fan_in).

    Cut at two deviations of the underlying normal and rescaled, so that the deviation is the stated one.
    init_scale = 0.1 is a tenth of the usual; the paper finds it steadier (table 3).

    Source: Switch Transformers, section 2.4, https://arxiv.org/abs/2101.03961.
    """
    init = jax.nn.initializers.variance_scaling(init_scale, "fan_in", "truncated_normal", batch_axis=0)

    def draw(name, fan_in, fan_out):  # in float32, so that `dtype` rounds the weights and doesn't change them
        return init(named_key(key, name), (num_experts, fan_in, fan_out), jnp.float32).astype(dtype)

    return ExpertParams(
        w_in_EDF=draw("w_in", d_model, d_ff),
        w_out_EFD=draw("w_out", d_ff, d_model),
        w_gate_EDF=draw("w_gate", d_model, d_ff) if gated else None,
    )


def apply_experts(
    params: ExpertParams,
    x_EGCD: Float[Array, "E G C D"],
    *,
    activation: Activation = "relu",
    dropout: float = 0.0,
    key: ScalarKey | None = None,
    group_G: Int[Array, " G"] | None = None,
    expert_E: Int[Array, " E"] | None = None,
) -> Float[Array, "E G C D"]:
    """Send each seat's token through its expert: act(x W_in) W_out, or (act(x W_gate) * (x W_in)) W_out.

    Computed in the dtype of `x_EGCD`. With a `key`, expert dropout zeroes hidden features with probability
    `dropout` and scales the rest by 1 / (1 - dropout); its noise follows the groups' and experts' indices in
    the whole batch and layer, `group_G` and `expert_E` (0, 1, ... unless given), not their place on a device.

    Source: Switch Transformers, section 2.4 (expert dropout); GLU Variants, https://arxiv.org/abs/2002.05202.
    """
    dtype = x_EGCD.dtype
    act = ACTIVATIONS[activation]
    num_experts, num_groups, seats = x_EGCD.shape[:3]
    # An expert's seats of all groups as the rows of one matrix: with the group as a dimension of its own, XLA
    # makes transposed copies for the weights' gradients, even where there is one group.
    x_ERD = rearrange(x_EGCD, "E G C D -> E (G C) D")
    h_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, params.w_in_EDF.astype(dtype))
    if params.w_gate_EDF is None:
        h_ERF = act(h_ERF)
    else:
        h_ERF = h_ERF * act(jnp.einsum("ERD,EDF->ERF", x_ERD, params.w_gate_EDF.astype(dtype)))
    if dropout > 0 and key is not None:
        group_G = jnp.arange(num_groups) if group_G is None else group_G
        expert_E = jnp.arange(num_experts) if expert_E is None else expert_E

        def keep(expert, group):
            seat_key = jax.random.fold_in(jax.random.fold_in(key, expert), group)
            return jax.random.bernoulli(seat_key, 1 - dropout, (seats, h_ERF.shape[-1]))

        keep_EGCF = jax.vmap(lambda e: jax.vmap(lambda g: keep(e, g))(group_G))(expert_E)
        h_ERF = jnp.where(rearrange(keep_EGCF, "E G C F -> E (G C) F"), h_ERF / (1 - dropout), 0)
    y_ERD = jnp.einsum("ERF,EFD->ERD", h_ERF, params.w_out_EFD.astype(dtype))
    return rearrange(y_ERD, "E (G C) D -> E G C D", G=num_groups)
