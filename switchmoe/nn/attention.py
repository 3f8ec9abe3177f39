"""Attention with grouped key/value heads, to a token's own row or to an encoder's.

Dimensions here beside the legend of `switchmoe.shapes`: N key/value heads, A features of one head, M places
that are attended to; the second S of a mask is the position attended to.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.nn import cudnn
from switchmoe.nn.attend import attend
from switchmoe.nn.cache import KeysValues
from switchmoe.nn.norm import RMSNorm
from switchmoe.nn.positions import rotate
from switchmoe.nn.weights import fan_in_normal
from switchmoe.parallel import Layout, constrain
from switchmoe.shapes import Array, Bool, Float, Int

NormOfHeads = Literal["none", "head", "full"]


def causal_mask(
    segments_BS: Int[Array, "B S"] | None,
    mask_BS: Bool[Array, "B S"] | None,
    sequence_length: int,
    window: int | None = None,
) -> Bool[Array, "batch 1 S S"]:
    """Say which tokens a token may look at: itself and earlier ones of its own segment that are no padding.

    With a `window`, only itself and the window - 1 places before it. The first dimension is 1 when neither
    segments nor a mask are given. Every token sees itself, padding too, so that no row of the softmax is
    empty.
    """
    order = jnp.arange(sequence_length)
    ahead_SS = order[None, :] - order[:, None]
    seen = (ahead_SS <= 0)[None]
    if window is not None:
        seen = seen & (ahead_SS > -window)
    if segments_BS is not None:
        seen = seen & (segments_BS[:, :, None] == segments_BS[:, None, :])
    if mask_BS is not None:
        seen = seen & (mask_BS[:, None, :] | jnp.eye(sequence_length, dtype=bool))
    return seen[:, None]


class Attention(nnx.Module):
    """Let every token gather from the tokens it may see; H query heads share N key/value heads, without
    biases.

    Parameters: `w_q_DHA`, `w_k_DNA`, `w_v_DNA`, `w_o_HAD`, each a truncated normal of standard deviation
    sqrt(init_scale / fan_in); where scores are not scaled, `w_q_DHA` is smaller by sqrt(head_dim) instead.
    Grouped heads: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245. With `rope_theta` queries and keys
    are turned by their positions (see `rotate`). With `qk_norm` they are
    normalised before that, by `q_norm` and `k_norm`, over the features of a head or of all heads together
    (Dehghani et al. 2023, section 2, https://arxiv.org/abs/2302.05442, in RMSNorm's form).
    `implementation` goes to `jax.nn.dot_product_attention`: "xla", or "cudnn", NVIDIA's fused kernel. None
    takes cudnn in bfloat16 on one Hopper GPU where tokens see their own row, without a bias, of even length
    from 128 on, with heads of a multiple of 8 features up to 128, `attend` on a CPU, and XLA's everywhere
    else. The kernel has no forward-mode derivative.

    Raises:
      ValueError: one sentence, if "cudnn" is asked for and can't run; for the platform and the lengths only
        when it is called.
    """

    # Only where qk_norm asks for them.
    q_norm: RMSNorm
    k_norm: RMSNorm

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float | None = 10000.0,
        qk_norm: NormOfHeads = "none",
        norm_eps: float = 1e-6,
        scale_scores: bool = True,
        init_scale: float = 1.0,
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: jax.typing.DTypeLike = "float32",
        param_dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        key = rngs.params()
        self.rope_theta, self.qk_norm, self.scale_scores = rope_theta, qk_norm, scale_scores
        self.implementation: Literal["xla", "cudnn"] | None = implementation
        self.dtype = jnp.dtype(dtype)
        if implementation == "cudnn":
            cudnn.raise_problem(dtype, head_dim)

        def draw(name: str, shape: tuple[int, ...], inputs: int = 1, scale: float = init_scale) -> nnx.Param:
            return nnx.Param(fan_in_normal(key, name, shape, inputs=inputs, scale=scale, dtype=param_dtype))

        q_scale = init_scale if scale_scores else init_scale / head_dim
        self.w_q_DHA = draw("w_q_DHA", (d_model, num_heads, head_dim), scale=q_scale)
        self.w_k_DNA = draw("w_k_DNA", (d_model, num_kv_heads, head_dim))
        self.w_v_DNA = draw("w_v_DNA", (d_model, num_kv_heads, head_dim))
        self.w_o_HAD = draw("w_o_HAD", (num_heads, head_dim, d_model), inputs=2)
        if qk_norm != "none":
            heads = (num_heads, num_kv_heads) if qk_norm == "full" else (1, 1)
            self.q_norm, self.k_norm = (
                RMSNorm(count * head_dim, eps=norm_eps, dtype=param_dtype) for count in heads
            )

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        seen_BSS: Bool[Array, "batch 1 queries places"] | None = None,
        bias_HSM: Float[Array, "1 heads S places"] | None = None,
        offered: KeysValues | None = None,
        layout: Layout | None = None,
    ) -> Float[Array, "B S D"]:
        """Mix tokens over the places they see: those of their own row, or what is `offered`.

        `positions_BS` counts from the start of a document (0, 1, ... over the row if None); `seen_BSS` comes
        from `causal_mask` (plain causal if None); `bias_HSM` is added to the scores; `offered` comes from
        `keys_values`, of other tokens, or of these and earlier ones; `layout` splits rows and heads over a
        mesh. Products in the module's dtype, the softmax in float32, the result in the type of x.
        """
        batch, length, _ = x_BSD.shape
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(length), (batch, length))
        implementation = self.implementation
        if implementation is None and offered is None and bias_HSM is None and layout is None:
            unasked = cudnn.is_taken_unasked(self.dtype, self.w_q_DHA.shape[-1], length)
            implementation = "cudnn" if unasked else None
        if seen_BSS is None:
            seen_BSS = causal_mask(None, None, length)
        q_BSHA = self._project(x_BSD, self.w_q_DHA)
        if offered is None:
            offered = self.keys_values(x_BSD, positions_BS, layout=layout)
        if self.qk_norm != "none":
            q_BSHA = self._normalise(self.q_norm, q_BSHA)
        if self.implementation == "cudnn":
            cudnn.raise_problem(self.dtype, q_BSHA.shape[-1], (length, offered.k_BNAM.shape[3]))
        q_BSHA = self._turn(constrain(layout, q_BSHA, "BSHA"), positions_BS)
        platform = jax.default_backend() if layout is None else layout.platform
        if implementation is None and platform == "cpu":
            scale = q_BSHA.shape[-1] ** -0.5 if self.scale_scores else 1.0
            mixed_BSHA = attend(q_BSHA, offered, seen_BSS=seen_BSS, bias_HSM=bias_HSM, scale=scale)
        else:
            mixed_BSHA = jax.nn.dot_product_attention(
                q_BSHA,
                offered.k_BNAM.transpose(0, 3, 1, 2).astype(self.dtype),
                offered.v_BNMA.swapaxes(1, 2).astype(self.dtype),
                None if bias_HSM is None else bias_HSM.astype(self.dtype),
                mask=seen_BSS,
                scale=None if self.scale_scores else 1.0,
                implementation=implementation,
            )
        w_o_ID = self.w_o_HAD[...].astype(self.dtype).reshape(-1, x_BSD.shape[-1])
        out_BSD = mixed_BSHA.reshape(batch, length, -1) @ w_o_ID
        return constrain(layout, out_BSD.astype(x_BSD.dtype), "BSD")

    def keys_values(
        self,
        x_BMD: Float[Array, "B M D"],
        positions_BM: Int[Array, "B M"] | None = None,
        *,
        layout: Layout | None = None,
    ) -> KeysValues:
        """Compute what tokens offer to those that look at them; positions are needed where they turn it."""
        k_BMNA, v_BMNA = self._project(x_BMD, self.w_k_DNA), self._project(x_BMD, self.w_v_DNA)
        if self.qk_norm != "none":
            k_BMNA = self._normalise(self.k_norm, k_BMNA)
        k_BMNA = self._turn(constrain(layout, k_BMNA, "BSNA"), positions_BM)
        v_BMNA = constrain(layout, v_BMNA, "BSNA")
        return KeysValues(k_BMNA.transpose(0, 2, 3, 1), v_BMNA.swapaxes(1, 2))

    def _project(self, x_BSD: Array, weight: nnx.Param) -> Array:
        return jnp.einsum("bsd,dha->bsha", x_BSD.astype(self.dtype), weight[...].astype(self.dtype))

    def _normalise(self, norm: RMSNorm, x_BSHA: Array) -> Array:
        if self.qk_norm == "head":
            return norm(x_BSHA)
        return norm(x_BSHA.reshape(*x_BSHA.shape[:2], -1)).reshape(x_BSHA.shape)

    def _turn(self, x_BSHA: Array, positions_BS: Array | None) -> Array:
        if self.rope_theta is None:
            return x_BSHA
        assert positions_BS is not None, "rotary attention needs to know where its keys are"
        return rotate(x_BSHA, positions_BS, self.rope_theta)
