"""The loss of a student that learns from the text and from a teacher's opinion of it."""

import jax
import jax.numpy as jnp
import optax

from switchmoe.shapes import Array, Float


def soften(
    hard: Float[Array, ""],
    logits_BSV: Float[Array, "B S V"],
    teacher_BSV: Float[Array, "B S V"],
    weight_BS: Float[Array, "B S"],
    *,
    share: float,
) -> Float[Array, ""]:
    """Judge every token's prediction by what came next and, to a `share`, by what a teacher thought would.

    Returns (1 - share) * hard + share * soft, where `hard` is the cross-entropy of the tokens that came and
    `soft` the sum over tokens of weight times the cross-entropy -sum_v q(v) log p(v) against the teacher's
    probabilities q, in nats and float32. Both are at temperature 1, and the teacher gets no gradient. Where
    the weight is 0 nothing counts.

    Source: Switch Transformers, section 4.2 (0.75 hard and 0.25 soft), https://arxiv.org/abs/2101.03961.
    """
    wanted_BSV = jax.nn.softmax(jax.lax.stop_gradient(teacher_BSV).astype(jnp.float32))
    nats_BS = optax.softmax_cross_entropy(logits_BSV.astype(jnp.float32), wanted_BSV)
    soft = jnp.sum(jnp.where(weight_BS == 0, 0.0, nats_BS * weight_BS))
    return (1 - share) * hard + share * soft
