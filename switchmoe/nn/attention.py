"""Causal self-attention with grouped key/value heads and rotary positions.

Dimensions here beside the legend of `switchmoe.shapes`: N key/value heads, A features of one head; the second
S of a mask is the position attended to.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.nn.weights import fan_in_normal
from switchmoe.parallel import Layout, constrain
from switchmoe.shapes import Array, Bool, Float, Int


def rotate(
    x: Float[Array, "B S heads A"], positions_BS: Int[Array, "B S"], theta: float
) -> Float[Array, "B S heads A"]:
    """Turn a token's query or key by angles that grow with its position, so that products see distances only.

    Feature i and feature i + A/2 form a pair, turned by position * theta ** (-2i / A) radians. Angles are
    float32, the result has the type of `x`. Source: Su et al. 2021, section 3.4.2,
    https://arxiv.org/abs/2104.09864; the pairing of halves instead of neighbours is that of Llama's and
    Mixtral's published weights.
    """
    half = x.shape[-1] // 2
    rate = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BS.astype(jnp.float32)[:, :, None, None] * rate
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(
    segments_BS: Int[Array, "B S"] | None,
    mask_BS: Bool[Array, "B S"] | None,
    sequence_length: int,
) -> Bool[Array, "batch 1 S S"]:
    """Say which tokens a token may look at: itself and earlier ones of its own segment that are no padding.

    The first dimension is 1 when neither segments nor a mask are given. Every token sees itself, padding too,
    so that no row of the softmax is empty.
    """
    order = jnp.arange(sequence_length)
    seen = (order[:, None] >= order[None, :])[None]
    if segments_BS is not None:
        seen = seen & (segments_BS[:, :, None] == segments_BS[:, None, :])
    if mask_BS is not None:
        seen = seen & (mask_BS[:, None, :] | jnp.eye(sequence_length, dtype=bool))
    return seen[:, None]


class Attention(nnx.Module):
    """Let every token gather from the tokens it may see; H query heads share N key/value heads, without
    biases.

    Parameters, float32: `w_q_DHA`, `w_k_DNA`, `w_v_DNA`, `w_o_HAD`, each a truncated normal of standard
    deviation sqrt(init_scale / fan_in). Grouped heads: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    `implementation` goes to `jax.nn.dot_product_attention`: None is XLA's everywhere, "cudnn" is NVIDIA's
    fused kernel, which wants bfloat16 and fails with a sentence where it cannot run.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float = 10000.0,
        init_scale: float = 1.0,
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        key = rngs.params()
        self.rope_theta = rope_theta
        self.implementation: Literal["xla", "cudnn"] | None = implementation
        self.dtype = jnp.dtype(dtype)
        query_shape, shared_shape = (d_model, num_heads, head_dim), (d_model, num_kv_heads, head_dim)
        output_shape = (num_heads, head_dim, d_model)
        self.w_q_DHA = nnx.Param(fan_in_normal(key, "w_q_DHA", query_shape, scale=init_scale))
        self.w_k_DNA = nnx.Param(fan_in_normal(key, "w_k_DNA", shared_shape, scale=init_scale))
        self.w_v_DNA = nnx.Param(fan_in_normal(key, "w_v_DNA", shared_shape, scale=init_scale))
        self.w_o_HAD = nnx.Param(fan_in_normal(key, "w_o_HAD", output_shape, inputs=2, scale=init_scale))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        seen_BSS: Bool[Array, "batch 1 S S"] | None = None,
        layout: Layout | None = None,
    ) -> Float[Array, "B S D"]:
        """Mix tokens over the positions they see.

        `positions_BS` counts from the start of a document (0, 1, ... over the row if None); `seen_BSS` comes
        from `causal_mask` (plain causal if None); `layout` splits rows and heads over a mesh. Products in the
        module's dtype, the softmax in float32, the result in the type of x.
        """
        batch, length, _ = x_BSD.shape
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(length), (batch, length))
        if seen_BSS is None:
            seen_BSS = causal_mask(None, None, length)
        narrow = x_BSD.astype(self.dtype)
        q_BSHA = jnp.einsum("bsd,dha->bsha", narrow, self.w_q_DHA[...].astype(self.dtype))
        k_BSNA = jnp.einsum("bsd,dna->bsna", narrow, self.w_k_DNA[...].astype(self.dtype))
        v_BSNA = jnp.einsum("bsd,dna->bsna", narrow, self.w_v_DNA[...].astype(self.dtype))
        mixed_BSHA = jax.nn.dot_product_attention(
            rotate(constrain(layout, q_BSHA, "BSHA"), positions_BS, self.rope_theta),
            rotate(constrain(layout, k_BSNA, "BSNA"), positions_BS, self.rope_theta),
            constrain(layout, v_BSNA, "BSNA"),
            mask=seen_BSS,
            implementation=self.implementation,
        )
        out_BSD = jnp.einsum("bsha,had->bsd", mixed_BSHA, self.w_o_HAD[...].astype(self.dtype))
        return constrain(layout, out_BSD.astype(x_BSD.dtype), "BSD")
