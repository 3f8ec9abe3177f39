"""Attention to keys and values that are kept, in the order of products that a CPU is fast at."""

import jax
import jax.numpy as jnp
from einops import rearrange

from switchmoe.nn.cache import KeysValues
from switchmoe.shapes import Array, Bool, Float


def attend(
    q_BSHA: Float[Array, "B S H A"],
    kept: KeysValues,
    *,
    seen_BSS: Bool[Array, "batch 1 queries places"],
    bias_HSM: Float[Array, "1 H S places"] | None,
    scale: float,
) -> Float[Array, "B S H A"]:
    """Mix for each token what it sees of M places, as `jax.nn.dot_product_attention` does.

    A key/value head serves its queries as the rows of one matrix, and the probabilities are made in the
    layout that the product with the values reads: XLA:CPU would turn both around, one thread alone. Products
    in the type of the queries, the softmax in float32.
    """
    groups = q_BSHA.shape[2] // kept.k_BMNA.shape[2]
    length = q_BSHA.shape[1]
    q_BNRA = rearrange(q_BSHA * scale, "B S (N G) A -> B N (G S) A", G=groups)
    k_BNAM = rearrange(kept.k_BMNA, "B M N A -> B N A M").astype(q_BSHA.dtype)
    v_BNMA = rearrange(kept.v_BMNA, "B M N A -> B N M A").astype(q_BSHA.dtype)
    scores = jnp.matmul(q_BNRA, k_BNAM, preferred_element_type=jnp.float32)
    scores = rearrange(scores, "B N (G S) M -> B N G S M", G=groups)
    if bias_HSM is not None:
        scores = scores + rearrange(bias_HSM, "1 (N G) S M -> 1 N G S M", G=groups)
    scores = jnp.where(seen_BSS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = rearrange(jax.nn.softmax(scores, axis=-1), "B N G S M -> B N (G S) M").astype(q_BSHA.dtype)
    mixed_BNRA = jnp.matmul(probs, v_BNMA)
    return rearrange(mixed_BNRA, "B N (G S) A -> B S (N G) A", S=length)
