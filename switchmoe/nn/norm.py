"""RMSNorm, the normalisation in front of every attention and feed-forward layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.shapes import Array, Float


def rms_norm(x: Float[Array, "*rows D"], scale_D: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Divide a token by its root mean square and stretch every feature by a learned factor.

    The mean of squares is taken in float32 whatever the type of `x`, and the result has the type of `x`
    again. Source: Zhang & Sennrich 2019, equation 4, https://arxiv.org/abs/1910.07467.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale_D).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Normalise a token by its root mean square; one parameter, `scale_D`, which starts at 1."""

    def __init__(self, d_model: int, *, eps: float = 1e-6, dtype: jax.typing.DTypeLike = "float32") -> None:
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones((d_model,), dtype))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise every token of x on its own; see `rms_norm`."""
        return rms_norm(x, self.scale_D[...], self.eps)
