"""How a row's next token is chosen from its scores: the best one, or a draw from those the settings leave.

Pure functions of logits [B, V] and of one key a row, so that no row's token depends on another row.
"""

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.shapes import Array, Float, Int, Key, ScalarKey


def keep_top_k(logits_BV: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Leave each row its k best tokens, and give all others a score of minus infinity.

    Of equal scores the lower token id is better, so that exactly k tokens stay, or all if k is more than V.
    """
    ids_BK = lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[1]
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    kept_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, ids_BK].set(True)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Float[Array, "B V"], p: float | Float[Array, ""]) -> Float[Array, "B V"]:
    """Leave each row the smallest set of its best tokens whose probabilities add up to p, and at least one.

    All others get a score of minus infinity. Of equal scores the lower token id is better; p = 1 keeps
    everything. This is nucleus sampling: Holtzman et al. 2019, section 3.1, https://arxiv.org/abs/1904.09751.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # The first one stays whatever p is; and a rounded sum must not cut off the last ones where p is 1.
    kept_BV = (before_BV < p) | (jnp.arange(logits_BV.shape[-1]) == 0) | (p >= 1)
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    kept_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, order_BV].set(kept_BV, unique_indices=True)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def choose_best(logits_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Take each row's best token; of equal scores the lowest id."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def draw_token(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Int[Array, " B"]:
    """Draw each row's token with probability softmax(logits / temperature), from those that may stay.

    First the temperature, then the k best, then of these the set that has a mass of p, with probabilities
    that add to 1 over the k. Each row draws with its own key.
    """
    # Relative to the best, so that a small temperature makes the others impossible and nothing overflows.
    scaled_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        scaled_BV = keep_top_k(scaled_BV, top_k)
    if top_p is not None:
        scaled_BV = keep_top_p(scaled_BV, top_p)
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)


def row_keys(key: ScalarKey, row_ids_B: Int[Array, " B"]) -> Key[Array, " B"]:
    """Give each row a key of its own, which depends on its id and not on its place in the batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids_B)


def step_keys(keys_B: Key[Array, " B"], step: int | Int[Array, ""]) -> Key[Array, " B"]:
    """Give each row the key of its next draw: that of its `step`-th new token."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)


def log_probs(logits_BV: Float[Array, "B V"], ids_B: Int[Array, " B"]) -> Float[Array, " B"]:
    """Say how probable the model itself found these tokens, as logarithms."""
    scores_B1 = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)
    return scores_B1[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
