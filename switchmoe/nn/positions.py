"""How attention knows where a token is: queries and keys are turned, or each distance has a learned bias."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from switchmoe.nn.weights import fan_in_normal
from switchmoe.shapes import Array, Float, Int


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


def bucket_distances(
    ahead: Int[Array, "*shape"], buckets: int, furthest: int, *, bidirectional: bool
) -> Int[Array, "*shape"]:
    """Put a token that is so many places ahead (behind, if negative) into a bucket of like distances.

    A bucket each for the near half of the distances, then buckets whose width grows with the logarithm of the
    distance, up to `furthest`, from where on all are in the last. With `bidirectional` the second half of the
    buckets is for tokens ahead; otherwise those are in bucket 0. Source: Raffel et al. 2020, section 2.1,
    https://arxiv.org/abs/1910.10683; the numbers of T5's published weights.
    """
    first = 0
    if bidirectional:
        buckets //= 2
        first = jnp.where(ahead > 0, buckets, 0)
        distance = jnp.abs(ahead)
    else:
        distance = jnp.maximum(-ahead, 0)
    near = buckets // 2
    # Where each wide bucket starts, on the host: a logarithm rounded down would be a matter of its last bit.
    steps = np.arange(1, buckets - near) / (buckets - near)
    starts = np.ceil(near * (furthest / near) ** steps - 1e-6).astype(np.int32)
    wide = near + jnp.sum(distance[..., None] >= starts, axis=-1, dtype=jnp.int32)
    return first + jnp.where(distance < near, distance, wide)


class RelativePositions(nnx.Module):
    """Favour some distances between tokens over others, each head by its own learned table.

    Parameter: `bias_UH`, for U buckets of distances (see `bucket_distances`).
    """

    def __init__(
        self,
        num_heads: int,
        *,
        buckets: int = 32,
        furthest: int = 128,
        bidirectional: bool,
        dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        self.furthest, self.bidirectional = furthest, bidirectional
        self.bias_UH = nnx.Param(fan_in_normal(rngs.params(), "bias_UH", (buckets, num_heads), dtype=dtype))

    def __call__(self, from_S: Int[Array, " S"], to_M: Int[Array, " M"]) -> Float[Array, "1 H S M"]:
        """Look up what attention scores from the positions `from_S` to the positions `to_M` have added."""
        bias_UH = self.bias_UH[...]
        ahead_SM = to_M[None, :] - from_S[:, None]
        bucket_SM = bucket_distances(
            ahead_SM, bias_UH.shape[0], self.furthest, bidirectional=self.bidirectional
        )
        return jnp.take(bias_UH, bucket_SM, axis=0).transpose(2, 0, 1)[None]
