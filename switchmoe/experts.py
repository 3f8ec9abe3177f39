"""The expert FFNs: each seat's token through its expert's two (or three, when gated) matrices."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.typing import DTypeLike

from switchmoe.config import Activation
from switchmoe.quantized import multiply, quantize_weight
from switchmoe.shapes import Array, Bool, Float, Int, Num, ScalarKey, named_key


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cut what is negative; the gradient at 0 is 0.

    As jax.nn.relu, but its gradient looks at the result, which the next product keeps anyway.
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


# Multiply-adds of an expert's product below which the experts are one batched product on a CPU too.
SMALL_PRODUCT = 2**22
ACTIVATIONS = {"relu": relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


class ExpertParams(NamedTuple):
    """The experts' weights, without biases.

    Attributes:
      w_in_EDF: into the hidden features.
      w_out_EFD: out of them.
      w_gate_EDF: the gate of a gated FFN, else None.
      w_in_scale_EQF, w_out_scale_EQD, w_gate_scale_EQF: where the weights are rounded to 8 or 4 bits, the
        scales that go with the values above; see `quantize_experts`. Else None.
    """

    w_in_EDF: Num[Array, "E D F"]
    w_out_EFD: Num[Array, "E F D"]
    w_gate_EDF: Num[Array, "E D F"] | None = None
    w_in_scale_EQF: Float[Array, "E Q F"] | None = None
    w_out_scale_EQD: Float[Array, "E Q D"] | None = None
    w_gate_scale_EQF: Float[Array, "E Q F"] | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many experts there are, and their D and F."""
        return len(self.w_in_EDF), self.w_out_EFD.shape[-1], self.w_in_EDF.shape[-1]

    @property
    def trainable(self) -> bool:
        """Whether the weights are what is trained, and not rounded."""
        return self.w_in_scale_EQF is None

    @property
    def gated(self) -> bool:
        """Whether they have a gate."""
        return self.w_gate_EDF is not None

    @property
    def matrices(self) -> dict[str, tuple[Array, Array | None]]:
        """The weights of all experts by name ("w_in", ...), each with its scales or None."""
        all_of_them = {
            "w_in": (self.w_in_EDF, self.w_in_scale_EQF),
            "w_out": (self.w_out_EFD, self.w_out_scale_EQD),
            "w_gate": (self.w_gate_EDF, self.w_gate_scale_EQF),
        }
        return {name: (w, scale) for name, (w, scale) in all_of_them.items() if w is not None}


def quantize_experts(params: ExpertParams, bits: int = 8) -> ExpertParams:
    """Round all experts' weights to whole numbers of 8 or 4 bits times scales; tokens are not rounded.

    A quarter of the memory in 8 bits (one scale a column), an eighth in 4 (one for 128 rows of a column).
    Such experts can't be trained. `multiply` in `switchmoe.quantized` says how a token meets them.

    Raises:
      ValueError: one sentence, if the bits are not 8 or 4, the weights are rounded already, or don't fit.
    """
    if not params.trainable:
        raise ValueError("The experts' weights are rounded already; start from the ones before.")
    w_in_EDF, w_in_scale_EQF = quantize_weight(params.w_in_EDF, bits)
    w_out_EFD, w_out_scale_EQD = quantize_weight(params.w_out_EFD, bits)
    w_gate_EDF = w_gate_scale_EQF = None
    if params.w_gate_EDF is not None:
        w_gate_EDF, w_gate_scale_EQF = quantize_weight(params.w_gate_EDF, bits)
    return ExpertParams(w_in_EDF, w_out_EFD, w_gate_EDF, w_in_scale_EQF, w_out_scale_EQD, w_gate_scale_EQF)


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
    part_of_F: tuple[Int[Array, ""] | int, int] = (0, 1),
) -> Float[Array, "E G C D"]:
    """Send each seat's token through its expert: act(x W_in) W_out, or (act(x W_gate) * (x W_in)) W_out.

    Computed in the dtype of `x_EGCD`. With a `key`, expert dropout zeroes hidden features with probability
    `dropout` and scales the rest by 1 / (1 - dropout); its noise follows the groups' and experts' indices in
    the whole batch and layer, `group_G` and `expert_E` (0, 1, ... unless given), not their place on a device.
    Where the hidden features are split, `part_of_F` says which of how many equal parts these are.

    Source: Switch Transformers, section 2.4 (expert dropout); GLU Variants, https://arxiv.org/abs/2002.05202.
    """
    dtype = x_EGCD.dtype
    num_experts, num_groups, seats, _ = x_EGCD.shape
    keep_ERF = None
    if dropout > 0 and key is not None:
        group_G = jnp.arange(num_groups) if group_G is None else group_G
        expert_E = jnp.arange(num_experts) if expert_E is None else expert_E

        def keep(expert, group):
            seat_key = jax.random.fold_in(jax.random.fold_in(key, expert), group)
            return draw_kept(seat_key, 1 - dropout, (seats, params.w_in_EDF.shape[-1]), part_of_F)

        keep_EGCF = jax.vmap(lambda e: jax.vmap(lambda g: keep(e, g))(group_G))(expert_E)
        keep_ERF = rearrange(keep_EGCF, "E G C F -> E (G C) F")

    def ffn(arrays):
        x_RD, matrices, keep_RF = arrays
        h_RF = multiply(x_RD, *matrices["w_in"])
        if "w_gate" in matrices:
            h_RF = h_RF * ACTIVATIONS[activation](multiply(x_RD, *matrices["w_gate"]))
        else:
            h_RF = ACTIVATIONS[activation](h_RF)
        if keep_RF is not None:
            h_RF = jnp.where(keep_RF, h_RF / (1 - dropout), 0)
        return multiply(h_RF, *matrices["w_out"])

    # An expert's seats of all groups are the rows of one matrix: with the group as a dimension of its own,
    # XLA makes transposed copies for the weights' gradients, even where there is one group.
    x_ERD = rearrange(x_EGCD, "E G C D -> E (G C) D")
    arrays = (x_ERD, cast_floats(params, dtype).matrices, keep_ERF)
    y_ERD = lax.platform_dependent(arrays, cpu=partial(_one_by_one, ffn), default=jax.vmap(ffn))
    return rearrange(y_ERD, "E (G C) D -> E G C D", G=num_groups)


def cast_floats(params: ExpertParams, dtype: DTypeLike) -> ExpertParams:
    """Bring weights into the type that experts compute in; what is rounded to whole numbers stays so."""
    return jax.tree.map(lambda w: w.astype(dtype) if params.trainable else w, params)


def draw_kept(
    key: ScalarKey, rate: float, shape: tuple[int, ...], part_of_F: tuple[Int[Array, ""] | int, int]
) -> Bool[Array, "*R F"]:
    """Draw which hidden features stay, for one part of all of them as if the others were here too."""
    part, parts = part_of_F
    keep_RF = jax.random.bernoulli(key, rate, (*shape[:-1], shape[-1] * parts))
    return lax.dynamic_slice_in_dim(keep_RF, part * shape[-1], shape[-1], axis=-1) if parts > 1 else keep_RF


def _one_by_one(ffn: Callable[..., Array], arrays: tuple) -> Float[Array, "E R D"]:
    """Run one expert after the other where that pays: on a CPU, what an expert made is still in its caches.

    A batched product there writes all experts' hidden features to memory before it reads any. Small experts
    are not worth the loop.
    """
    x_ERD, matrices, _ = arrays
    if x_ERD.shape[1] * matrices["w_in"][0][0].size < SMALL_PRODUCT:
        return jax.vmap(ffn)(arrays)
    return lax.map(ffn, arrays)
