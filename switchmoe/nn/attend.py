"""Attention in the order of products that a CPU is fast at, forward and backward."""

import jax
import jax.numpy as jnp
from einops import rearrange

from switchmoe.nn.cache import KeysValues
from switchmoe.shapes import Array, Bool, Float


def attend(
    q_BSHA: Float[Array, "B S H A"],
    offered: KeysValues,
    *,
    seen_BSS: Bool[Array, "batch 1 queries places"],
    bias_HSM: Float[Array, "1 H S places"] | None,
    scale: float,
) -> Float[Array, "B S H A"]:
    """Mix for each token what it sees of M places, as `jax.nn.dot_product_attention` does.

    A key/value head serves its queries as the rows of one matrix, and the probabilities are made in the
    layout that the product with the values reads: XLA:CPU would turn both around, one thread alone. Sums that
    a derivative needs are products too, which it is much faster at. Products in the type of the queries, the
    softmax in float32.
    """
    groups = q_BSHA.shape[2] // offered.k_BNAM.shape[1]
    length = q_BSHA.shape[1]
    q_BNRA = rearrange(q_BSHA * scale, "B S (N G) A -> B N (G S) A", G=groups)
    k_BNAM, v_BNMA = (a.astype(q_BSHA.dtype) for a in offered)
    scores = jnp.matmul(q_BNRA, k_BNAM, preferred_element_type=jnp.float32)
    scores = rearrange(scores, "B N (G S) M -> B N G S M", G=groups)
    if bias_HSM is not None:
        bias = rearrange(bias_HSM.astype(jnp.float32), "1 (N G) S M -> N G S M", G=groups)
        # To every row by a product, so that the bias's gradient is one; with a batch of heads, so that
        # remat="dots" does not take it for one of those products to keep.
        ones_NB = jnp.ones((len(bias), len(q_BSHA)), jnp.float32)
        scores = scores + jnp.einsum("nb,ngsm->bngsm", ones_NB, bias)
    scores = jnp.where(seen_BSS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = rearrange(_softmax(scores), "B N G S M -> B N (G S) M").astype(q_BSHA.dtype)
    mixed_BNRA = jnp.matmul(probs, v_BNMA)
    return rearrange(mixed_BNRA, "B N (G S) A -> B S (N G) A", S=length)


@jax.custom_jvp
def _softmax(scores: Float[Array, "... M"]) -> Float[Array, "... M"]:
    return jax.nn.softmax(scores, axis=-1)


@_softmax.defjvp
def _softmax_derivative(primals, tangents):
    probs, (change,) = _softmax(*primals), tangents
    mean = jnp.einsum("...m,...m->...", probs, change, precision="highest")
    return probs, probs * (change - mean[..., None])
