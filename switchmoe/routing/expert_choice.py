"""Expert choice: each expert takes the tokens that suit it best, so that every expert is full."""

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import ExpertChoice, Router, refuse_unread
from switchmoe.routing.groupwise import groupwise_router
from switchmoe.routing.linear import all_real
from switchmoe.seats import expert_seats
from switchmoe.shapes import Array, Bool, Float


def choose_by_experts(
    logits_TE: Float[Array, "*G T E"], *, capacity: int, mask: Bool[Array, "*G T"] | None = None
) -> ExpertChoice:
    """Let each expert take the `capacity` tokens of a group that give it the highest probability.

    A token's probabilities are its softmax over experts, and the seat's weight is the token's probability for
    that expert. A token may be taken by several experts or by none. Ties go to the earliest token. Masked
    tokens are never taken: a seat beyond the real tokens stays empty (token T, weight 0). Float32.

    The paper's variant that caps the experts a token may get, by a linear program, is not here.

    Raises:
      ValueError: if `capacity` is below 1 or above the group's tokens.

    Source: Mixture-of-Experts with Expert Choice Routing, section 3.2, https://arxiv.org/abs/2202.09368.
    """
    num_tokens = logits_TE.shape[-2]
    if not 1 <= capacity <= num_tokens:
        raise ValueError(f"capacity is {capacity}, but must be from 1 to the group's {num_tokens} tokens.")
    logits_TE = logits_TE.astype(jnp.float32)
    mask_T = all_real(logits_TE, mask)
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    # Log probabilities are in the same order, also where probabilities are too small for float32.
    order_TE = jnp.maximum(jax.nn.log_softmax(logits_TE, axis=-1), jnp.finfo(jnp.float32).min)
    order_TE = lax.stop_gradient(jnp.where(mask_T[..., None], order_TE, -jnp.inf))
    token_EC = lax.top_k(jnp.swapaxes(order_TE, -1, -2), capacity)[1]
    prob_EC = jnp.take_along_axis(jnp.swapaxes(probs_TE, -1, -2), token_EC, axis=-1)
    # Real tokens are taken before masked ones, so the seats that are not filled come last.
    filled_C = jnp.arange(capacity) < mask_T.sum(axis=-1, keepdims=True)
    filled_EC = jnp.broadcast_to(filled_C[..., None, :], token_EC.shape)
    return ExpertChoice(
        token_GEC=jnp.where(filled_EC, token_EC, num_tokens).astype(jnp.int32),
        weight_GEC=jnp.where(filled_EC, prob_EC, 0.0),
        logits_GTE=logits_TE,
        probs_GTE=probs_TE,
        mask_GT=mask_T,
    )


def expert_choice(config: MoEConfig) -> Router:
    """Let each expert take as many tokens of a group as it has seats (see `choose_by_experts`).

    `config.top_k` times the capacity factor is the mean number of experts a token gets. There is no `weigh`,
    since tokens choose nothing, and a balance bias would change nothing: it is the same for all the tokens
    that compete for an expert.
    """
    refuse_unread(config, "jitter", "input_dropout")
    if config.dispatch == "dropless":
        raise ValueError(
            "router='expert_choice' fills a number of seats, which dispatch='dropless' does not have; "
            "choose dispatch='gather'."
        )

    def decide(logits_TE, *, train, mask):
        seats = expert_seats(config, tokens=logits_TE.shape[-2], train=train)
        return choose_by_experts(logits_TE, capacity=seats, mask=mask)

    return groupwise_router(config, decide, None, leak="a later token can take an earlier one's seat")
